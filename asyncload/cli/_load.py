"""``asyncload load``: a load with a progress bar and a summary."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from asyncload.cli._request import dtype_spec, options_with
from asyncload.cli._run import run
from asyncload.cli.progress import ProgressBar
from asyncload.cli.summary import Summary, summarize
from asyncload.options import DecodeOption, Options

__all__ = ["load"]


def load(
    file: str,
    *,
    device: str | None,
    dtypes: Sequence[tuple[str | None, str]],
    select: Sequence[str | int] | None,
    decode: DecodeOption | None,
    as_json: bool,
    progress: bool,
) -> None:
    """Loads a model, prints how that went and lets it go; raises what ``Loader.load`` raises.

    ``dtypes`` are pairs of a pattern, or None for the rest, and a dtype.
    """
    bar = ProgressBar(sys.stderr) if progress and sys.stderr.isatty() else None
    try:
        summary = run(
            partial(_load, file, device, options_with(decode), dtype=dtype_spec(dtypes), select=select, progress=bar)
        )
    finally:
        if bar is not None:
            bar.close()
    print(json.dumps(summary.as_dict(), indent=2, ensure_ascii=False) if as_json else summary.render())


async def _load(file: str, device: str | None, options: Options, **request: Any) -> Summary:
    from asyncload.loader import Loader

    async with Loader(device=device, options=options) as loader:
        with await loader.load(file, **request) as model:
            return summarize(file, model)
