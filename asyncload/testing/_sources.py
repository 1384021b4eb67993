"""Sources that are slow, far away or broken, around one that works."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Mapping

import anyio

from asyncload.source import BlockingSource, Source

__all__ = ["AsyncOnlySource", "FaultySource", "LatencySource", "ThrottledSource"]


class AsyncOnlySource:
    """A source without its blocking form, as an object store is one."""

    def __init__(self, source: Source) -> None:
        self._source = source

    @property
    def url(self) -> str:
        """The inner source's."""
        return self._source.url

    @property
    def size(self) -> int:
        """The inner source's."""
        return self._source.size

    @property
    def identity(self) -> Hashable:
        """The inner source's."""
        return self._source.identity

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Reads from the inner source."""
        await self._source.read_into(offset, buffer)

    async def aclose(self) -> None:
        """Closes the inner source."""
        await self._source.aclose()


class _Delayed:
    """What the delaying wrappers share: both forms of reading, each after the delay that ``delay`` gives in seconds."""

    def __init__(self, source: BlockingSource, delay: Callable[[int], float]) -> None:
        self._source = source
        self._delay = delay

    @property
    def url(self) -> str:
        """The inner source's."""
        return self._source.url

    @property
    def size(self) -> int:
        """The inner source's."""
        return self._source.size

    @property
    def identity(self) -> Hashable:
        """The inner source's."""
        return self._source.identity

    def read_into_blocking(self, offset: int, buffer: memoryview) -> None:
        """Waits, then reads from the inner source."""
        time.sleep(self._delay(buffer.nbytes))
        self._source.read_into_blocking(offset, buffer)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Waits, then reads from the inner source."""
        await anyio.sleep(self._delay(buffer.nbytes))
        await self._source.read_into(offset, buffer)

    def close(self) -> None:
        """Closes the inner source."""
        self._source.close()

    async def aclose(self) -> None:
        """Closes the inner source."""
        await self._source.aclose()


class LatencySource(_Delayed):
    """A source each of whose reads takes ``seconds`` longer."""

    def __init__(self, source: BlockingSource, seconds: float) -> None:
        super().__init__(source, lambda _: seconds)


class ThrottledSource(_Delayed):
    """A source that gives at most ``bandwidth`` bytes a second, to all its readers together."""

    def __init__(self, source: BlockingSource, bandwidth: float) -> None:
        super().__init__(source, self._turn)
        self._bandwidth = bandwidth
        self._lock = threading.Lock()
        self._free_at = 0.0

    def _turn(self, nbytes: int) -> float:
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + nbytes / self._bandwidth
            return self._free_at - now


class FaultySource(_Delayed):
    """A source some of whose reads raise; ``faults`` makes the error of a read by its number, counted from 0.

    ``reads`` is the number of reads so far.
    """

    def __init__(self, source: BlockingSource, faults: Mapping[int, Callable[[], Exception]]) -> None:
        super().__init__(source, self._count)
        self._faults = faults
        self._lock = threading.Lock()
        self.reads = 0

    def _count(self, nbytes: int) -> float:
        del nbytes
        with self._lock:
            number, self.reads = self.reads, self.reads + 1
        if number in self._faults:
            error = self._faults[number]()
            try:
                raise error
            finally:
                del error  # it refers to this frame
        return 0.0
