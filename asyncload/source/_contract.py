"""The contract of a source."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final, Protocol, runtime_checkable

from asyncload.errors import RangeError

__all__ = ["HEAD", "BlockingSource", "Source", "check_read"]

HEAD: Final = 256 << 10  # bytes that are read first of a model's file, which begins with its header


@runtime_checkable
class Source(Protocol):
    """A range of bytes that does not change while it is read."""

    @property
    def url(self) -> str:
        """What the source is called in messages."""
        ...

    @property
    def size(self) -> int:
        """Bytes in all."""
        ...

    @property
    def identity(self) -> Hashable:
        """What must stay the same for a load to go on: for a file its device, inode, size and modification time."""
        ...

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills all of ``buffer`` from byte ``offset`` on, or raises.

        The caller owns the buffer; once this has returned or raised, cancelled or not, it is not written any more.
        Raises ``RangeError`` before anything moves if the range leaves the source, ``SourceChangedError`` if the
        source is no longer what was opened, ``SourceReadError`` if it cannot be read.
        """
        ...

    async def aclose(self) -> None:
        """Gives up what the source holds; further calls do nothing."""
        ...


@runtime_checkable
class BlockingSource(Source, Protocol):
    """A source that a worker thread can read by itself, without a hop through the event loop."""

    def read_into_blocking(self, offset: int, buffer: memoryview) -> None:
        """``read_into`` for the calling thread."""
        ...

    def close(self) -> None:
        """``aclose`` for the calling thread."""
        ...


def check_read(source: Source, offset: int, nbytes: int) -> None:
    """Raises ``RangeError`` unless the range lies inside the source."""
    if offset < 0 or offset + nbytes > source.size:
        raise RangeError(
            f"{source.url}: a read of {nbytes} bytes at {offset} leaves the {source.size} bytes there are",
            offset=offset,
            nbytes=nbytes,
            limit=source.size,
        )
