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
    """``count`` buffers of ``nbytes`` bytes, one a stream, which are there as long as anybody needs them.

    What a stream copies into its buffer comes behind the kernels that read what was there before, so one is enough,
    whoever uses the stream.
    """

    def __init__(self, tracker: VramTracker, nbytes: int, count: int) -> None:
        self._tracker = tracker
        self._nbytes = nbytes
        self._count = count
        self._lock = threading.Lock()
        self._users = 0
        self._buffers: list[Allocation] = []

    def acquire(self) -> Sequence[DeviceMemory]:
        """The buffers, allocated for the first of their users; blocks. Raises ``OutOfDeviceMemoryError``."""
        with self._lock:
            if not self._users:
                self._buffers = [
                    self._tracker.allocate(self._nbytes, Purpose.SCRATCH, f"packed bytes on stream {index}")
                    for index in range(self._count)
                ]
            self._users += 1
            return [buffer.memory for buffer in self._buffers]

    def release(self) -> None:
        """Says that one user's work has ended; the last one's frees the buffers. Never waits for the device."""
        with self._lock:
            self._users -= 1
            if not self._users:
                self._buffers = []
