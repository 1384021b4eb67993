"""A local file that C++ reads: each call is one, for which the interpreter lock is given up once at most."""

from __future__ import annotations

import errno
import os
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from asyncload.errors import SourceChangedError, SourceNotFoundError, SourceReadError
from asyncload.source._contract import HEAD, check_read
from asyncload.threads import run_in_thread

__all__ = ["NativeFileSource"]


class NativeFileSource:
    """A regular file, held open; its identity is device, inode, size and modification time.

    ``file`` is the ``asyncload_native.File``, which whoever holds it may go on to read after the source was closed;
    ``head`` are its first bytes, which were read as it was opened.
    Raises ``ImportError`` where the extension was not built, ``SourceNotFoundError`` or ``SourceReadError`` if the file
    cannot be opened. Blocks.
    """

    def __init__(self, path: str) -> None:
        opened: Any = import_module("asyncload_native").File.open
        self._path = path
        self.file: Any
        self.head: bytes
        with self._mapping_errors(opening=True):
            self.file, self.head = opened(os.fsencode(path), HEAD)
        self._identity: tuple[int, ...] = self.file.identity

    @property
    def url(self) -> str:
        """The path as it was given."""
        return self._path

    @property
    def size(self) -> int:
        """Bytes in the file when it was opened."""
        return self._identity[2]

    @property
    def identity(self) -> tuple[int, ...]:
        """Device, inode, size and modification time when it was opened."""
        return self._identity

    def read_into_blocking(self, offset: int, buffer: memoryview) -> None:
        """Fills ``buffer`` from byte ``offset`` on, and checks that the file is still the one that was opened."""
        check_read(self, offset, buffer.nbytes)
        file = self.open_file(offset)
        with self._mapping_errors():
            file.read(offset, buffer)

    def open_file(self, offset: int | None = None) -> Any:
        """The file, or ``SourceReadError`` if this was closed; ``offset`` is what was to be read."""
        file = self.file  # which another thread may close
        if file is None:
            raise SourceReadError(f"{self._path}: it is closed", url=self._path, offset=offset)
        return file

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """``read_into_blocking`` on a thread of its own."""
        await run_in_thread(self.read_into_blocking, offset, buffer)

    @property
    def closed(self) -> bool:
        """Whether it was let go."""
        return self.file is None

    def close(self) -> None:
        """Lets the file go; blocks if nobody else holds it."""
        self.file, self.head = None, b""

    async def aclose(self) -> None:
        """Lets the file go."""
        await run_in_thread(self.close)

    @contextmanager
    def _mapping_errors(self, *, opening: bool = False) -> Generator[None]:
        module: Any = import_module("asyncload_native")
        try:
            yield
        except module.ReadError as error:
            if opening and error.errno == errno.ENOENT:
                raise SourceNotFoundError(f"{self._path}: no such file", url=self._path) from error
            if error.kind == "changed":
                raise SourceChangedError(error.strerror, url=self._path) from error
            raise SourceReadError(
                error.strerror,
                url=self._path,
                offset=error.offset,
                transient=error.transient,
                errno=error.errno or None,
            ) from error
