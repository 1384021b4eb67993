"""``asyncload warmup``: kernels compiled ahead."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from asyncload.cli._run import run
from asyncload.options import Options

__all__ = ["warm_up"]

_ALL = ("float32", "float16", "bfloat16")


def warm_up(*, device: str | None, dtypes: Sequence[str] | None) -> None:
    """Compiles the kernels of a device, or of the host and the first GPU; raises what ``Loader.warm_up`` raises."""
    from asyncload.device import default_device

    for name in dict.fromkeys([device] if device else ["host", default_device()]):
        begin = time.monotonic()
        run(partial(_warm_up, name, dtypes or _ALL))
        print(f"{name}: kernels to {', '.join(dtypes or _ALL)} are ready, after {time.monotonic() - begin:.1f} s")


async def _warm_up(device: str, dtypes: Sequence[str]) -> None:
    from asyncload.loader import Loader

    async with Loader(device, options=Options.from_env()) as loader:
        await loader.warm_up(dtypes)
