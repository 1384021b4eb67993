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
        self._unused = True  # as far as those said who have released them

    def acquire(self) -> Sequence[DeviceMemory]:
        """The buffers, allocated for the first of their users; blocks. Raises ``OutOfDeviceMemoryError``."""
        with self._lock:
            if self._memory is None:
                total = self._count * self._nbytes
                self._memory = self._tracker.allocate(total, Purpose.SCRATCH, "packed bytes that are being decoded")
            self._users += 1
            return [self._memory.memory.part(index * self._nbytes, self._nbytes) for index in range(self._count)]

    def release(self, *, unused: bool = False) -> None:
        """One user is done; the last one's release frees the buffers. Never waits for the device.

        ``unused``: his work has been seen to end. If all say so, the buffers are freed at once, else when the device's
        work has ended (``Allocation.close``).
        """
        with self._lock:
            self._users -= 1
            self._unused = self._unused and unused
            if not self._users and self._memory is not None:
                self._memory.close(unused=self._unused)
                self._memory, self._unused = None, True
