"""The ledger of device memory, and the thread that frees it once nothing on the device can use it any more."""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

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


# What the reclaim thread is handed: memory to free, or an event to set once all that came before it is freed.
_Reclaim = queue.SimpleQueue[_Entry | threading.Event]


class Allocation:
    """Device memory that lives as long as this object, or until ``close``.

    The last reference may be dropped, and ``close`` called, on any thread, and while enqueued work still uses the
    memory: it is freed by the tracker's thread, after all work that was enqueued on the device before.
    """

    __slots__ = ("__weakref__", "_entry", "_owned", "_reclaim")

    def __init__(self, entry: _Entry, reclaim: _Reclaim) -> None:
        self._entry = entry
        self._reclaim = reclaim
        self._owned = [entry] if entry.memory.nbytes else []  # popped by whoever lets go first

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
        return f"Allocation({self.nbytes} bytes at {self.address:#x}, {self.purpose}, {self.description!r})"


class VramTracker:
    """The ledger through which all memory of a device is allocated and freed.

    All methods may be called on any thread; ``allocate``, ``flush`` and ``close`` may wait for the device. What was
    dropped is freed by a thread of the tracker's own, which runs as long as any allocation is alive.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._name = device.info.name
        self._reclaim: _Reclaim = queue.SimpleQueue()
        self._lock = threading.Lock()  # over all that follows
        self._ledger: dict[int, _Entry] = {}  # by address
        self._leaving: set[_Entry] = set()  # being freed: the device may already give the address to somebody else
        self._outstanding = 0  # allocations that the thread still has to see
        self._thread: threading.Thread | None = None  # alive as long as anything is outstanding
        self._failures: list[Exception] = []
        self._closed = False

    def allocate(self, nbytes: int, purpose: Purpose, description: str) -> Allocation:
        """Allocates ``nbytes`` bytes of device memory for a purpose; ``description`` says what they hold. Blocks.

        If the device is full, what was dropped and still waits for the device's work is waited for, and freed, first.
        Raises ``OutOfDeviceMemoryError`` with the ledger's breakdown by purpose, ``ClosedError`` after ``close``, and
        ``DeviceError`` if the device hands out an address that is in the ledger.
        """
        with self._lock:
            if self._closed:
                raise ClosedError(f"the ledger of {self._name} is closed")
        self._device.attach()
        entry = _Entry(self._allocate(nbytes, purpose, description), purpose, description)
        if nbytes:
            self._record(entry)
        return Allocation(entry, self._reclaim)

    def _allocate(self, nbytes: int, purpose: Purpose, description: str) -> DeviceMemory:
        try:
            return self._device.allocate(nbytes)
        except OutOfDeviceMemoryError:
            self._settle()
        try:
            return self._device.allocate(nbytes)
        except OutOfDeviceMemoryError as error:
            breakdown = {purpose.value: size for purpose, size in self.by_purpose().items()}
            free = "unknown" if error.available is None else format_size(error.available)
            held = ", ".join(f"{format_size(size)} {name}" for name, size in breakdown.items())
            raise OutOfDeviceMemoryError(
                f"{self._name}: {format_size(nbytes)} needed for {purpose} ({description}), {free} free; "
                f"held here: {held or 'nothing'}",
                device=self._name,
                needed=nbytes,
                available=error.available,
                breakdown=breakdown,
                code=error.code,
            ) from error

    def _record(self, entry: _Entry) -> None:
        address = entry.memory.address
        with self._lock:
            if address in self._ledger:
                other = self._ledger[address].description
                raise DeviceError(
                    f"{self._name}: {address:#x} was allocated for {entry.description!r} and holds {other!r}",
                    device=self._name,
                )
            self._ledger[address] = entry
            self._outstanding += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="asyncload-reclaim", daemon=True)
                self._thread.start()

    # What it holds

    def _entries(self) -> list[_Entry]:
        with self._lock:
            return [*self._ledger.values(), *self._leaving]

    @property
    def total(self) -> int:
        """Bytes allocated and not yet freed."""
        return sum(entry.memory.nbytes for entry in self._entries())

    def by_purpose(self) -> dict[Purpose, int]:
        """Bytes allocated and not yet freed for each purpose that has any."""
        return _by_purpose(self._entries())

    def report(self) -> str:
        """A table of the ledger for people: bytes and allocations by purpose, and the largest allocations."""
        entries = self._entries()
        sizes, counts = _by_purpose(entries), Counter(entry.purpose for entry in entries)
        rows = [(str(purpose), format_size(size), str(counts[purpose])) for purpose, size in sizes.items()]
        rows.append(("total", format_size(sum(sizes.values())), str(len(entries))))
        lines = [f"{self._name:<12}{'size':>12}{'allocations':>14}"]
        lines += [f"{name:<12}{size:>12}{count:>14}" for name, size, count in rows]
        entries.sort(key=lambda entry: entry.memory.nbytes, reverse=True)
        if entries:
            lines.append("largest:")
        lines += [f"{format_size(entry.memory.nbytes):>24}  {entry.description}" for entry in entries[:_LARGEST]]
        return "\n".join(lines)

    # Freeing

    def flush(self) -> None:
        """Waits until everything that was dropped before this call is freed.

        Raises the first error that freeing has met since the last flush. Memory of which the device would
        not say that it is unused stays allocated, and is tried again by the next drop or flush.
        """
        self._settle()
        with self._lock:
            failures, self._failures = self._failures, []
        if failures:
            raise failures[0]

    def close(self) -> None:
        """Ends allocating, and waits until everything that was dropped before this call is freed.

        Allocations that are alive stay so, and are freed when they are dropped.
        """
        with self._lock:
            self._closed = True
        self._settle()

    def _settle(self) -> None:
        flush = threading.Event()
        with self._lock:
            if self._thread is None:
                return
            self._reclaim.put(flush)
        flush.wait()

    def _run(self) -> None:
        entries: list[_Entry] = []
        while True:
            items = [self._reclaim.get()]
            while not self._reclaim.empty():  # this thread alone takes from it
                items.append(self._reclaim.get())
            entries += [item for item in items if isinstance(item, _Entry)]
            if entries and self._wait_for_device():
                self._free(entries)
                entries = []
            for item in items:
                if isinstance(item, threading.Event):
                    item.set()
            with self._lock:
                if self._outstanding == 0 and self._reclaim.empty():
                    self._thread = None
                    return

    def _wait_for_device(self) -> bool:
        """Whether all work that was enqueued on the device until now has ended; without that nothing is freed."""
        try:
            self._device.attach()
            self._device.barrier().synchronize()
        except Exception as error:  # noqa: BLE001 - the thread outlives it, and flush raises it
            self._fail("could not wait for the device before freeing memory", error)
            return False
        return True

    def _free(self, entries: list[_Entry]) -> None:
        with self._lock:
            for entry in entries:
                del self._ledger[entry.memory.address]
            self._leaving.update(entries)
        freed: list[_Entry] = []
        for entry in entries:
            try:
                self._device.free(entry.memory)
            except Exception as error:  # noqa: BLE001 - as above; the memory stays in the ledger, as it is taken
                self._fail(f"could not free {entry.memory.nbytes} bytes ({entry.description})", error)
            else:
                freed.append(entry)
        with self._lock:
            self._leaving.difference_update(freed)
            self._outstanding -= len(entries)

    def _fail(self, what: str, error: Exception) -> None:
        _log.error("%s: %s", self._name, what, exc_info=error)
        with self._lock:
            self._failures.append(error)


def _by_purpose(entries: Iterable[_Entry]) -> dict[Purpose, int]:
    sizes = dict.fromkeys(Purpose, 0)
    for entry in entries:
        sizes[entry.purpose] += entry.memory.nbytes
    return {purpose: size for purpose, size in sizes.items() if size}
