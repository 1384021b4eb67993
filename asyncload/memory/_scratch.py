"""Device memory in which packed bytes wait for their decoding."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from asyncload.device import DeviceMemory
from asyncload.memory._allocation import Allocation
from asyncload.memory._ledger import Purpose
from asyncload.memory._tracker import VramTracker

__all__ = ["Scratch"]


class Scratch:
    """``count`` buffers of ``nbytes`` bytes, which are there as long as anybody needs them: one a stream, or a chunk.

    What is copied into a stream's, or out of a staging buffer into its own, comes behind the kernels that read what was
    there before, so one is enough, whoever uses the stream or the staging buffer. They are one allocation.
    """

    def __init__(self, tracker: VramTracker, nbytes: int, count: int) -> None:
        self._tracker = tracker
        self._nbytes = nbytes
        self._count = count
        self._lock = threading.Lock()
        self._users = 0
        self._memory: Allocation | None = None

    def acquire(self) -> Sequence[DeviceMemory]:
        """The buffers, allocated for the first of their users; blocks. Raises ``OutOfDeviceMemoryError``."""
        with self._lock:
            if self._memory is None:
                total = self._count * self._nbytes
                self._memory = self._tracker.allocate(total, Purpose.SCRATCH, "packed bytes that are being decoded")
            self._users += 1
            return [self._memory.memory.part(index * self._nbytes, self._nbytes) for index in range(self._count)]

    def release(self) -> None:
        """Says that one user's work has ended; the last one's frees the buffers. Never waits for the device."""
        with self._lock:
            self._users -= 1
            if not self._users and self._memory is not None:
                self._memory.close(unused=True)
                self._memory = None
