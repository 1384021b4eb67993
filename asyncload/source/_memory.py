"""Bytes that are in memory already."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final

from asyncload.source._contract import check_read
from asyncload.threads import run_in_thread

__all__ = ["MemorySource"]

# Slice assignment keeps the interpreter lock; a piece of this size keeps it for about 0.1 ms.
_PIECE: Final = 1 << 20


class MemorySource:
    """A source over any object with a contiguous buffer, which must not change while it is read."""

    def __init__(self, data: bytes | bytearray | memoryview, url: str = "memory") -> None:
        self._data = memoryview(data).cast("B")
        self._url = url

    @property
    def url(self) -> str:
        """The name given."""
        return self._url

    @property
    def size(self) -> int:
        """Bytes in the buffer."""
        return self._data.nbytes

    @property
    def identity(self) -> Hashable:
        """The buffer itself."""
        return (self._url, id(self._data.obj), self._data.nbytes)

    def read_into_blocking(self, offset: int, buffer: memoryview) -> None:
        """Fills ``buffer`` from byte ``offset`` on."""
        check_read(self, offset, buffer.nbytes)
        for start in range(0, buffer.nbytes, _PIECE):
            end = min(start + _PIECE, buffer.nbytes)
            buffer[start:end] = self._data[offset + start : offset + end]

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """``read_into_blocking`` on a thread of its own."""
        await run_in_thread(self.read_into_blocking, offset, buffer)

    def close(self) -> None:
        """Does nothing: the caller owns the buffer."""

    async def aclose(self) -> None:
        """Does nothing: the caller owns the buffer."""
