"""Where bytes come from: the contract of a source, and the door to its backends."""

from __future__ import annotations

import os

from asyncload.source._contract import BlockingSource, LocalSource, Source, check_read
from asyncload.source._file import FileSource
from asyncload.source._memory import MemorySource

__all__ = ["BlockingSource", "LocalSource", "MemorySource", "Source", "check_read", "open_source"]


def open_source(path: str | os.PathLike[str]) -> BlockingSource:
    """Opens a local file for reading; blocks.

    Raises ``SourceNotFoundError`` if there is none, ``SourceReadError`` if it cannot be opened or is no regular file.
    """
    return FileSource(path)
