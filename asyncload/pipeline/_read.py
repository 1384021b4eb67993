"""Reads that failed for a passing reason are made again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio

from asyncload.errors import SourceError, SourceReadError
from asyncload.options import Options

__all__ = ["read_patiently"]


async def read_patiently(
    options: Options, tensor: str, read: Callable[[], Awaitable[object]], failed: Callable[[], object] | None = None
) -> None:
    """Makes a read until it succeeds, as often as the options say; ``failed`` is called before each repetition.

    Raises what the read raises once it is given up, or at once where the reason will not pass; that names ``tensor``.
    """
    for attempt in range(options.retries + 1):
        try:
            await read()
        except SourceError as error:
            if not error.transient or attempt == options.retries:
                if isinstance(error, SourceReadError):
                    error.tensor = tensor
                raise
            if failed is not None:
                failed()
            await anyio.sleep(options.retry_delay * 2**attempt)
        else:
            return
