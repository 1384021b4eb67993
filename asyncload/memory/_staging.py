"""Staging memory: a fixed budget, shared fairly by all loads of a loader.

One allocation for the loader's life, cut into buffers of one size. A free buffer goes to the waiting load that holds
the fewest, so that a small load beside a large one has its share at once.
"""

from __future__ import annotations

import threading
from collections import deque

import anyio

from asyncload.device import Device, StagingMemory
from asyncload.threads import LoopHandle

__all__ = ["StagingBuffer", "StagingPool", "StagingShare"]


class StagingBuffer:
    """One buffer of the pool: a writable ``view`` of its bytes, which start at ``offset`` of ``memory``."""

    __slots__ = ("memory", "offset", "share", "view")

    def __init__(self, memory: StagingMemory, offset: int, nbytes: int) -> None:
        self.memory = memory
        self.offset = offset
        self.view = memory.view[offset : offset + nbytes]
        self.share: StagingShare | None = None

    def release(self) -> None:
        """Gives the buffer back, on any thread; no copy reads it any more and no thread writes it."""
        if self.share is not None:
            self.share.pool.release(self)


class _Waiter:
    __slots__ = ("buffer", "loop", "ready")

    def __init__(self) -> None:
        self.buffer: StagingBuffer | None = None
        self.loop = LoopHandle()
        self.ready = anyio.Event()


class StagingShare:
    """One load's account with the pool."""

    def __init__(self, pool: StagingPool) -> None:
        self.pool = pool
        self.held = 0
        self.waiters: deque[_Waiter] = deque()

    async def acquire(self) -> StagingBuffer:
        """Waits for a buffer, which is the caller's until ``release``."""
        return await self.pool.acquire(self)


class StagingPool:
    """``count`` buffers of ``chunk_size`` bytes each, from one allocation of the device; blocks while it is made."""

    def __init__(self, device: Device, chunk_size: int, count: int) -> None:
        self._memory = device.staging(chunk_size * count)
        self._lock = threading.Lock()
        self._all = [StagingBuffer(self._memory, index * chunk_size, chunk_size) for index in range(count)]
        self._free = list(reversed(self._all))  # a stack: the buffer used last is the one still in the cache
        self._waiting: list[StagingShare] = []

    @property
    def nbytes(self) -> int:
        """The whole budget in bytes."""
        return self._memory.nbytes

    @property
    def free(self) -> int:
        """Buffers that nobody holds."""
        with self._lock:
            return len(self._free)

    def share(self) -> StagingShare:
        """Opens an account for a load."""
        return StagingShare(self)

    async def acquire(self, share: StagingShare) -> StagingBuffer:
        """Waits for a buffer on a share's account."""
        await anyio.lowlevel.checkpoint_if_cancelled()
        waiter: _Waiter | None = None
        with self._lock:
            if self._free:
                return self._grant(self._free.pop(), share)
            waiter = _Waiter()
            share.waiters.append(waiter)
            if share not in self._waiting:
                self._waiting.append(share)
        try:
            await waiter.ready.wait()
        except BaseException:
            with self._lock:
                if waiter.buffer is None:
                    self._forget(share, waiter)
            if waiter.buffer is not None:  # granted while the cancellation was on its way
                waiter.buffer.release()
            raise
        assert waiter.buffer is not None
        return waiter.buffer

    def release(self, buffer: StagingBuffer) -> None:
        """Takes a buffer back and hands it on to the waiting load that holds the fewest; on any thread."""
        if buffer.share is None:
            return
        buffer.memory.discard(buffer.offset, buffer.view.nbytes)
        with self._lock:
            buffer.share.held -= 1
            buffer.share = None
            if not self._waiting:
                self._free.append(buffer)
                return
            share = min(self._waiting, key=lambda waiting: waiting.held)
            waiter = share.waiters[0]
            self._forget(share, waiter)
            waiter.buffer = self._grant(buffer, share)
        waiter.loop.post(waiter.ready.set)

    def _grant(self, buffer: StagingBuffer, share: StagingShare) -> StagingBuffer:
        buffer.share = share
        share.held += 1
        return buffer

    def _forget(self, share: StagingShare, waiter: _Waiter) -> None:
        share.waiters.remove(waiter)
        if not share.waiters:
            self._waiting.remove(share)

    def close(self) -> None:
        """Frees the memory; all buffers have come back. Blocks."""
        for buffer in self._all:
            buffer.view.release()
        self._memory.close()
