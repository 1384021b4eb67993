"""``asyncload load``: a load with a progress bar and a summary."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial

from asyncload.cli._run import run
from asyncload.cli.progress import ProgressBar
from asyncload.cli.summary import Summary, summarize
from asyncload.options import Options

__all__ = ["load"]


def load(
    file: str,
    *,
    device: str | None,
    dtypes: Sequence[tuple[str | None, str]],
    select: Sequence[str | int] | None,
    as_json: bool,
    progress: bool,
) -> None:
    """Loads a model, prints how that went and lets it go; raises what ``Loader.load`` raises.

    ``dtypes`` are pairs of a pattern, or None for the rest, and a dtype.
    """
    bar = ProgressBar(sys.stderr) if progress and sys.stderr.isatty() else None
    try:
        summary = run(partial(_load, file, device, _dtype_spec(dtypes), select, bar))
    finally:
        if bar is not None:
            bar.close()
    print(json.dumps(summary.as_dict(), indent=2, ensure_ascii=False) if as_json else summary.render())


def _dtype_spec(dtypes: Sequence[tuple[str | None, str]]) -> str | dict[str, str]:
    """The loader's form of the command's dtypes: one dtype, or a mapping whose catch-all, if any, comes last."""
    patterns = {pattern: dtype for pattern, dtype in dtypes if pattern is not None}
    rest = [dtype for pattern, dtype in dtypes if pattern is None][-1:]
    if not patterns:
        return rest[0] if rest else "packed"
    return patterns | dict.fromkeys(("*",) if rest else (), rest[0] if rest else "")


async def _load(
    file: str,
    device: str | None,
    dtype: str | dict[str, str],
    select: Sequence[str | int] | None,
    bar: ProgressBar | None,
) -> Summary:
    from asyncload.loader import Loader

    async with Loader(device=device, options=Options.from_env()) as loader:
        with await loader.load(file, dtype=dtype, select=select, progress=bar) as model:
            return summarize(file, model)
