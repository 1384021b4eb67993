"""The ledger of device memory, and the thread that frees it once nothing on the device can use it any more."""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from operator import attrgetter

from asyncload.device import Device, DeviceMemory
from asyncload.errors import ClosedError, DeviceError, OutOfDeviceMemoryError
from asyncload.options import format_size

__all__ = ["Allocation", "Purpose", "VramTracker"]

_log = logging.getLogger("asyncload.memory")
_LARGEST = 5  # allocations that a report names


class Purpose(StrEnum):
    """What device memory is for."""

    WEIGHTS = "weights"
    SLOTS = "slots"
    SCRATCH = "scratch"
    KV_CACHE = "kv_cache"
    WORKSPACE = "workspace"
    UNKNOWN = "unknown"


@dataclass(frozen=True, eq=False, slots=True)
class _Entry:
    """A line of the ledger."""

    memory: DeviceMemory
    purpose: Purpose
    description: str


@dataclass(eq=False, slots=True)
class _Flush:
    """Asks the reclaim thread to say when everything dropped before has been dealt with."""

    ended: threading.Event = field(default_factory=threading.Event)


_Reclaim = queue.SimpleQueue[_Entry | _Flush]


class Allocation:
    """Device memory that lives as long as this object, or until ``close``.

    The last reference may be dropped, and ``close`` called, on any thread, and while enqueued work still uses the
    memory: it is freed by the tracker's thread, after all work that was enqueued on the device before.
    """

    __slots__ = ("__weakref__", "_entry", "_owned", "_reclaim")

    def __init__(self, entry: _Entry, reclaim: _Reclaim) -> None:
        self._entry = entry
        self._reclaim = reclaim
        self._owned = [entry]  # popped by whoever lets go first: one bytecode, so no lock

    @property
    def memory(self) -> DeviceMemory:
        """The range of device memory; not to be used any more after ``close``."""
        return self._entry.memory

    @property
    def address(self) -> int:
        """Where the memory starts; 0 when it is empty."""
        return self._entry.memory.address

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self._entry.memory.nbytes

    @property
    def purpose(self) -> Purpose:
        """What it is for."""
        return self._entry.purpose

    @property
    def description(self) -> str:
        """What it holds, for people."""
        return self._entry.description

    def close(self) -> None:
        """Lets the memory go; further calls do nothing. Never blocks."""
        # A finalizer runs wherever the garbage collector happens to, also inside a locked region of this thread.
        # ``SimpleQueue.put`` may be called there; a lock may not be taken.
        try:
            entry = self._owned.pop()
        except IndexError:
            return
        self._reclaim.put(entry)

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "" if self._owned else ", closed"
        return f"Allocation({self.nbytes} bytes at {self.address:#x}, {self.purpose}, {self.description!r}{state})"


class VramTracker:
    """The ledger through which all memory of a device is allocated and freed.

    All methods may be called on any thread, but as all but ``total``, ``by_purpose`` and ``report`` may wait for the
    device, not on an event loop's. A thread of its own frees what was dropped; it runs as long as there is anything
    to free.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._ledger: dict[int, _Entry] = {}  # by address
        self._leaving: set[_Entry] = set()  # being freed: the device may already give the address to somebody else
        self._reclaim: _Reclaim = queue.SimpleQueue()
        self._outstanding = 0  # entries that an Allocation holds, or that the thread has not dealt with
        self._thread: threading.Thread | None = None
        self._errors: list[DeviceError] = []
        self._closed = False

    def allocate(self, nbytes: int, purpose: Purpose, description: str) -> Allocation:
        """Allocates ``nbytes`` bytes of device memory for a purpose; ``description`` says what they hold. Blocks.

        If the device is full, memory that was dropped and is still waiting for the device's work is waited for first.
        Raises ``OutOfDeviceMemoryError`` with the ledger's breakdown by purpose, ``ClosedError`` after ``close``.
        """
        self._device.attach()
        try:
            return self._record(nbytes, purpose, description)
        except OutOfDeviceMemoryError:
            if not self._settle():
                raise
        return self._record(nbytes, purpose, description)

    def _record(self, nbytes: int, purpose: Purpose, description: str) -> Allocation:
        self._expect()
        try:
            memory = self._allocate(nbytes, purpose, description)
            entry = _Entry(memory, purpose, description)
            with self._lock:
                if memory.nbytes and memory.address in self._ledger:
                    raise DeviceError(
                        f"{self._device.info.name}: {memory.address:#x} was allocated and is already in the ledger as "
                        f"{self._ledger[memory.address].description!r}",
                        device=self._device.info.name,
                    )
                self._ledger[memory.address] = entry
            return Allocation(entry, self._reclaim)
        except BaseException:
            self._reclaim.put(_Flush())
            raise
