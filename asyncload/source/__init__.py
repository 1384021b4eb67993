"""Where bytes come from: the contract of a source, and the door to its backends."""

from __future__ import annotations

import os

from asyncload.source._contract import HEAD, BlockingSource, Source, check_read
from asyncload.source._file import FileSource
from asyncload.source._memory import MemorySource
from asyncload.source._native_file import NativeFileSource

__all__ = ["HEAD", "BlockingSource", "MemorySource", "NativeFileSource", "Source", "check_read", "open_source"]


def open_source(path: str | os.PathLike[str], *, native: bool = True) -> BlockingSource:
    """Opens a local file for reading, for C++ threads too if ``native`` and the extension was built; blocks.

    Raises ``SourceNotFoundError`` if there is none, ``SourceReadError`` if it cannot be opened or is no regular file.
    """
    if native:
        try:
            return NativeFileSource(os.fsdecode(path))
        except ImportError:
            pass
    return FileSource(path)
