"""The ledger of device memory, and the thread that frees it once nothing on the device can use it any more."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence

from asyncload.device import Device, DeviceMemory, Recipient, Residency
from asyncload.errors import ClosedError, LedgerError, OutOfDeviceMemoryError, PlanError, ResidencyError
from asyncload.memory._allocation import Allocation, Dropped, Reclaim, Registration
from asyncload.memory._ledger import Entry, Ledger, Purpose
from asyncload.memory._reconcile import Baseline, Reconciliation
from asyncload.memory._report import bytes_by_purpose, format_report
from asyncload.options import format_size

__all__ = ["VramTracker"]

_log = logging.getLogger("asyncload.memory")
_NAMED = 5  # allocations that an error's message names


class VramTracker:
    """The ledger through which all memory of a device is allocated and freed.

    All methods may be called on any thread; those that say so block on the driver or wait for the device, as making a
    tracker does. What was dropped is freed by a thread of the tracker's own, which runs until the tracker is
    closed and no allocation is alive.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._name = device.info.name
        self._opened = Baseline(device)
        self._reclaim: Reclaim = queue.SimpleQueue()
        self._lock = threading.Lock()  # over all that follows
        self._ledger = Ledger(self._name)
        self._strays: set[Entry] = set()  # allocated where somebody else's registration stands in the ledger
        self._leaving: set[Entry] = set()  # being freed: the device may already give the address to somebody else
        self._outstanding = 0  # allocations that the thread still has to see
        self._failures: list[Exception] = []
        self._closed = False
        # It runs from here on: starting a thread takes the interpreter lock twice, which a load can do without.
        self._thread: threading.Thread | None = threading.Thread(
            target=self._run, name="asyncload-reclaim", daemon=True
        )
        self._thread.start()

    def allocate(self, nbytes: int, purpose: Purpose, description: str) -> Allocation:
        """Allocates ``nbytes`` bytes of device memory for a purpose; ``description`` says what they hold. Blocks.

        If the device is full, what was dropped and still waits for the device's work is waited for, and freed, first.
        Raises ``OutOfDeviceMemoryError`` with the ledger's breakdown by purpose, ``ClosedError`` after ``close``, and
        ``LedgerError`` if the device hands out memory that is in the ledger.
        """
        with self._lock:
            self._check_open()
        self._device.attach()
        entry = Entry(self._allocate(nbytes, purpose, description), purpose, description)
        if nbytes:
            self._record(entry)
        return Allocation(entry, self._reclaim)

    def allocate_all(self, sizes: Mapping[str, int], purpose: Purpose) -> list[Allocation]:
        """Allocates for several purposes at once, all or none; ``sizes`` are the bytes by their descriptions. Blocks.

        Raises what ``allocate`` raises.
        """
        with self._lock:
            self._check_open()
        try:
            memory = self._device.allocate_all(list(sizes.values()))
        except OutOfDeviceMemoryError:  # one by one: what was dropped is freed first, and the error says what failed
            return [self.allocate(nbytes, purpose, description) for description, nbytes in sizes.items()]
        allocations: list[Allocation] = []
        left = iter(memory)
        try:
            for each, description in zip(left, sizes, strict=True):
                entry = Entry(each, purpose, description)
                if each.nbytes:
                    self._record(entry)
                allocations.append(Allocation(entry, self._reclaim))
        except BaseException:
            for each in left:  # what was recorded is freed as its allocations go
                self._device.free(each)
            raise
        return allocations

    def allocate_some(
        self, sizes: Mapping[str, int], purpose: Purpose, recipient: Recipient, keep: Callable[[int, Allocation], None]
    ) -> None:
        """Allocates as many of several as the device has memory for, from the first on. Blocks.

        ``recipient`` is told of each as soon as it is there, and may have the device write to it from then on. So
        ``keep`` gets each, with its position among the sizes, before this raises ``LedgerError``, which it does if the
        device hands out memory that is in the ledger. ``ClosedError`` after ``close``, and ``DeviceError``, are raised
        before anything is allocated. Why there are no more, ``allocate`` of the next one says.
        """
        with self._lock:
            self._check_open()
        errors: list[LedgerError] = []
        made = self._device.allocate_some(list(sizes.values()), recipient)
        for position, (memory, description) in enumerate(zip(made, sizes, strict=False)):
            entry = Entry(memory, purpose, description)
            if memory.nbytes and (other := self._enter(entry)) is not None:
                errors.append(self._ledger.overlap(entry, other))
                if not other.registered:
                    continue
                with self._lock:  # it is freed when its owner, who may have it written to, lets it go
                    self._strays.add(entry)
                    self._outstanding += 1
            keep(position, Allocation(entry, self._reclaim))
        if errors:
            raise errors[0]

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

    def _enter(self, entry: Entry) -> Entry | None:
        """Enters a line into the ledger; returns the other one that has its memory already."""
        with self._lock:
            other = self._ledger.overlapping(entry.memory)
            if other is None:
                self._ledger.add(entry)
                self._outstanding += 1
            return other

    def _record(self, entry: Entry) -> None:
        other = self._enter(entry)
        if other is None:
            return
        # What the device gave is ours: its former owner has freed it and not closed his registration. Memory that we
        # hold already is a device gone wrong, of which freeing would take what is in use.
        if other.registered:
            self._device.free(entry.memory)
        raise self._ledger.overlap(entry, other)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the ledger of {self._name} is closed")

    # Memory of others

    def register(self, address: int, nbytes: int, purpose: Purpose, description: str) -> Registration:
        """Records device memory that somebody else owns and frees, such as a framework's KV cache. Never blocks.

        It counts by its purpose and in the total until the registration is closed, which is to be before its owner
        frees it. Raises ``PlanError`` unless the address and ``nbytes`` are above zero and the purpose is one,
        ``LedgerError`` if the range overlaps one of the ledger, and ``ClosedError`` after ``close``.
        """
        if address < 1 or nbytes < 1:
            raise PlanError(f"{description!r}: {nbytes} bytes at {address:#x} are no memory that could be registered")
        if purpose not in list(Purpose):
            raise PlanError(f"{description!r}: {purpose!r} is no purpose: use one of {', '.join(Purpose)}")
        entry = Entry(DeviceMemory(address, nbytes), Purpose(purpose), description, registered=True)
        with self._lock:
            self._check_open()
            self._ledger.add(entry)
        return Registration(entry, self._unregister)

    def _unregister(self, entry: Entry) -> None:
        with self._lock:
            self._ledger.remove(entry)

    # What it holds

    def _entries(self) -> list[Entry]:
        with self._lock:
            return [*self._ledger, *self._strays, *self._leaving]

    @property
    def total(self) -> int:
        """Bytes allocated and not yet freed, and bytes registered."""
        return sum(entry.memory.nbytes for entry in self._entries())

    def by_purpose(self) -> dict[Purpose, int]:
        """Bytes allocated and not yet freed, and bytes registered, for each purpose that has any."""
        return bytes_by_purpose(self._entries())

    def report(self) -> str:
        """A table of the ledger for people, of one moment.

        Bytes and allocations by purpose and in all, how much of that was registered, and the largest allocations.
        """
        return format_report(self._name, self._entries())

    # Whether it is true

    def verify_residency(self) -> None:
        """Asks the driver of all memory in the ledger whether it is this device's own. Blocks.

        Raises ``ResidencyError``, which names what is not: managed memory, the host's, another device's, or nothing
        that the driver knows. What is being freed is not asked about.
        """
        with self._lock:
            entries = list(self._ledger)
        asked = [(entry, self._device.residency(entry.memory)) for entry in entries]
        with self._lock:  # what has left the ledger meanwhile may have been freed before it was asked about
            strays = [
                (entry, where) for entry, where in asked if where is not Residency.DEVICE and entry in self._ledger
            ]
        if strays:
            raise self._not_resident(strays)

    def _not_resident(self, strays: Sequence[tuple[Entry, Residency]]) -> ResidencyError:
        named = [f"{entry} is {where}" for entry, where in strays[:_NAMED]]
        if len(strays) > _NAMED:
            named.append(f"and {len(strays) - _NAMED} more")
        return ResidencyError(
            f"{self._name}: memory in the ledger is not this device's: {'; '.join(named)}",
            device=self._name,
            allocations=[entry.description for entry, _ in strays],
        )

    def reconcile(self) -> Reconciliation:
        """Holds what the ledger says against the change in what the driver says since the tracker was made. Blocks.

        The two are not asked at one moment: what is allocated or freed meanwhile shows as a difference, and so does
        registered memory that was there before the tracker.
        """
        return self._opened.reconcile(self._entries())

    # Freeing

    def flush(self) -> None:
        """Waits until everything that was dropped before this call is freed.

        Blocks. Raises the first error that freeing has met since the last flush. Memory of which the device would not
        say that it is unused stays allocated, and is tried again by the next drop or flush.
        """
        self._settle()
        with self._lock:
            failures, self._failures = self._failures, []
        if failures:
            raise failures[0]

    def close(self) -> None:
        """Ends allocating and registering, and waits until everything that was dropped before this call is freed.

        Blocks. Allocations that are alive stay so, and are freed when they are dropped.
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
        entries: list[Entry] = []
        while True:
            items = [self._reclaim.get()]
            while not self._reclaim.empty():  # this thread alone takes from it
                items.append(self._reclaim.get())
            dropped = [item for item in items if isinstance(item, Dropped)]
            if unused := [each.entry for each in dropped if each.unused]:
                self._free(unused)
            entries += [each.entry for each in dropped if not each.unused]
            if entries and self._wait_for_device():
                self._free(entries)
                entries = []
            for item in items:
                if isinstance(item, threading.Event):
                    item.set()
            with self._lock:
                if self._closed and self._outstanding == 0 and self._reclaim.empty():
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

    def _free(self, entries: list[Entry]) -> None:
        leaving = self._take_out(entries)
        try:
            self._device.attach()
            failures = self._device.free_all([entry.memory for entry in leaving])
        except Exception as whole:  # noqa: BLE001 - the thread outlives it; what may be free or not is not used again
            failures = dict.fromkeys([entry.memory for entry in leaving], whole)
        freed = [entry for entry in leaving if entry.memory not in failures]
        for entry in leaving:  # what is not freed stays in the ledger, as it is taken
            if (error := failures.get(entry.memory)) is not None:
                self._fail(f"could not free {entry.memory.nbytes} bytes ({entry.description})", error)
        with self._lock:
            self._leaving.difference_update(freed)
            self._outstanding -= len(leaving)

    def _take_out(self, entries: Sequence[Entry]) -> list[Entry]:
        """Moves lines from the ledger to those that are leaving, and returns them without the unknown ones."""
        leaving: list[Entry] = []
        unknown: list[LedgerError] = []
        with self._lock:
            for entry in entries:
                if entry in self._strays:
                    self._strays.remove(entry)
                    leaving.append(entry)
                    continue
                try:
                    self._ledger.remove(entry)
                except LedgerError as error:
                    unknown.append(error)
                else:
                    leaving.append(entry)
            self._leaving.update(leaving)
        for failure in unknown:
            self._fail("was to free memory that is not in the ledger", failure)
        return leaving

    def _fail(self, what: str, error: Exception) -> None:
        _log.error("%s: %s", self._name, what, exc_info=error)
        with self._lock:
            self._failures.append(error)
