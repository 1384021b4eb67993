"""Other libraries' memory in the ledger: counted, told apart, never freed; and the ledger under many threads."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from types import TracebackType

import pytest

from asyncload.device import DeviceMemory, HostDevice
from asyncload.errors import ClosedError, LedgerError, OutOfDeviceMemoryError, PlanError, ResidencyError
from asyncload.memory import Allocation, Purpose, VramTracker
from asyncload.memory._allocation import Dropped
from asyncload.memory._ledger import Entry, Ledger

TIMEOUT = 60.0
KIB = 1 << 10
FAR = 1 << 50  # no address that the host's allocations have
WRITERS, TURNS = 4, 100


class Device(HostDevice):
    """Notes what is freed, and hands out a given range once."""

    def __init__(self) -> None:
        super().__init__(total_bytes=1 << 30)
        self.freed: list[DeviceMemory] = []
        self.answer: DeviceMemory | None = None

    def allocate(self, nbytes: int) -> DeviceMemory:
        answer, self.answer = self.answer, None
        return answer or super().allocate(nbytes)

    def free(self, memory: DeviceMemory) -> None:
        self.freed.append(memory)
        if memory.address < FAR:
            super().free(memory)


@pytest.fixture
def device() -> Iterator[Device]:
    device = Device()
    yield device
    device.close()


@pytest.fixture
def tracker(device: Device) -> Iterator[VramTracker]:
    tracker = VramTracker(device)
    yield tracker
    tracker.close()


def test_registered_memory_counts_until_it_is_closed(tracker: VramTracker, device: Device) -> None:
    weights = tracker.allocate(KIB, Purpose.WEIGHTS, "a tensor")
    registration = tracker.register(FAR, 3 * KIB, Purpose.KV_CACHE, "the cache")
    assert (registration.address, registration.nbytes) == (FAR, 3 * KIB)
    assert registration.memory == DeviceMemory(FAR, 3 * KIB)
    assert (registration.purpose, registration.description) == ("kv_cache", "the cache")
    assert repr(registration) == f"Registration(3072 bytes at {FAR:#x}, kv_cache, 'the cache')"
    assert tracker.total == 4 * KIB
    assert tracker.by_purpose() == {Purpose.WEIGHTS: KIB, Purpose.KV_CACHE: 3 * KIB}
    for _ in range(2):
        registration.close()
        assert tracker.by_purpose() == {Purpose.WEIGHTS: KIB}
    weights.close()
    tracker.flush()
    assert device.freed == [weights.memory]


def test_a_block_ends_a_registration_however_it_ends(tracker: VramTracker, device: Device) -> None:
    with tracker.register(FAR, KIB, Purpose.WORKSPACE, "activations") as registration:
        assert (tracker.total, registration.nbytes) == (KIB, KIB)
    with pytest.raises(ZeroDivisionError), tracker.register(FAR, KIB, Purpose.WORKSPACE, "activations"):
        raise ZeroDivisionError
    assert (tracker.total, device.freed) == (0, [])


def test_a_registration_closed_twice_leaves_the_next_one_alone(tracker: VramTracker) -> None:
    first = tracker.register(FAR, KIB, Purpose.KV_CACHE, "first")
    first.close()
    tracker.register(FAR, KIB, Purpose.KV_CACHE, "second")
    first.close()
    assert "second" in tracker.report()


def test_a_registration_that_is_dropped_stays(tracker: VramTracker) -> None:
    tracker.register(FAR, KIB, Purpose.KV_CACHE, "for the program's life")
    tracker.flush()
    assert tracker.by_purpose() == {Purpose.KV_CACHE: KIB}


@pytest.mark.parametrize(
    ("offset", "nbytes"), [(0, 4 * KIB), (0, 1), (KIB, KIB), (4 * KIB - 1, KIB), (-KIB, KIB + 1), (-KIB, 8 * KIB)]
)
@pytest.mark.parametrize("held", ["allocated", "registered"])
def test_what_overlaps_the_ledger_is_refused(tracker: VramTracker, held: str, offset: int, nbytes: int) -> None:
    line = (
        tracker.allocate(4 * KIB, Purpose.WEIGHTS, "the first")
        if held == "allocated"
        else tracker.register(FAR, 4 * KIB, Purpose.WEIGHTS, "the first")
    )
    memory = line.memory
    with pytest.raises(LedgerError, match="holds 'the first'") as caught:
        tracker.register(memory.address + offset, nbytes, Purpose.KV_CACHE, "the second")
    assert (caught.value.address, caught.value.nbytes) == (memory.address + offset, nbytes)
    assert tracker.by_purpose() == {Purpose.WEIGHTS: 4 * KIB}
    line.close()
    tracker.flush()
    tracker.register(memory.address + offset, nbytes, Purpose.KV_CACHE, "the second").close()


@pytest.mark.parametrize(("address", "nbytes"), [(0, KIB), (-256, KIB), (FAR, 0), (FAR, -1)])
def test_what_is_no_memory_is_refused(tracker: VramTracker, address: int, nbytes: int) -> None:
    with pytest.raises(PlanError, match="'a cache'"):
        tracker.register(address, nbytes, Purpose.KV_CACHE, "a cache")
    assert tracker.total == 0


def test_a_purpose_is_one_of_those_there_are(tracker: VramTracker) -> None:
    with pytest.raises(PlanError, match="use one of weights, slots, scratch, kv_cache, workspace, unknown"):
        tracker.register(FAR, KIB, "kv", "a cache")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert tracker.report()


def test_memory_freed_before_its_registration_was_closed_is_not_lost(tracker: VramTracker, device: Device) -> None:
    """The driver gives its range, which is free, to the next who asks: that one is told, and nothing stays taken."""
    stale = tracker.register(FAR, 4 * KIB, Purpose.KV_CACHE, "a cache that is gone")
    device.answer = DeviceMemory(FAR + KIB, KIB)
    with pytest.raises(LedgerError, match="holds 'a cache that is gone'"):
        tracker.allocate(KIB, Purpose.WEIGHTS, "a tensor")
    assert device.freed == [DeviceMemory(FAR + KIB, KIB)]
    stale.close()


def test_of_several_that_are_allocated_at_once_none_is_left_when_one_is_not_free(
    tracker: VramTracker, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = tracker.register(FAR, 4 * KIB, Purpose.KV_CACHE, "a cache that is gone")
    given = [device.allocate(KIB), DeviceMemory(FAR, KIB), device.allocate(KIB), device.allocate(KIB)]

    def allocate_all(_sizes: Sequence[int]) -> list[DeviceMemory]:
        return given

    monkeypatch.setattr(device, "allocate_all", allocate_all)
    with pytest.raises(LedgerError, match="holds 'a cache that is gone'"):
        tracker.allocate_all(dict.fromkeys("abcd", KIB), Purpose.WEIGHTS)
    tracker.flush()
    assert sorted(memory.address for memory in device.freed) == sorted(memory.address for memory in given)
    assert tracker.by_purpose() == {Purpose.KV_CACHE: 4 * KIB}
    stale.close()
    assert tracker.total == 0


class Notes:
    def __init__(self) -> None:
        self.given: list[int] = []

    def give(self, address: int) -> bool:
        self.given.append(address)
        return False


def test_of_several_those_that_fit_are_kept_by_their_positions(tracker: VramTracker, device: Device) -> None:
    notes, kept = Notes(), dict[int, Allocation]()
    sizes = {"a": KIB, "b": 0, "c": 2 * KIB, "too much": 1 << 60, "d": KIB}
    tracker.allocate_some(sizes, Purpose.WEIGHTS, notes, kept.__setitem__)
    assert [(position, made.description, made.nbytes) for position, made in kept.items()] == [
        (0, "a", KIB),
        (1, "b", 0),
        (2, "c", 2 * KIB),
    ]
    assert notes.given == [made.address for made in kept.values()]
    assert tracker.by_purpose() == {Purpose.WEIGHTS: 3 * KIB}
    for made in kept.values():
        made.close()
    tracker.flush()
    assert (len(device.freed), tracker.total) == (2, 0)
    tracker.close()
    with pytest.raises(ClosedError):
        tracker.allocate_some(sizes, Purpose.WEIGHTS, notes, kept.__setitem__)


def test_of_several_those_are_kept_that_came_before_any_error(tracker: VramTracker, device: Device) -> None:
    def refuse(_nbytes: int) -> None:
        if len(notes.given) == 2:
            raise ZeroDivisionError

    class Refusing(Notes):
        def give(self, address: int) -> bool:
            super().give(address)
            if len(self.given) == 2:
                raise ZeroDivisionError
            return False

    sizes = dict.fromkeys("abcd", KIB)
    for notes, hook in ((Notes(), refuse), (Refusing(), None)):
        kept = dict[int, Allocation]()
        device.on_allocate = hook
        tracker.allocate_some(sizes, Purpose.WEIGHTS, notes, kept.__setitem__)
        assert [made.address for made in kept.values()] == notes.given
        assert (len(kept), tracker.total) == (2, 2 * KIB)
        for made in kept.values():
            made.close()
        tracker.flush()


def test_what_may_be_written_to_already_is_freed_only_when_its_owner_lets_it_go(
    tracker: VramTracker, device: Device
) -> None:
    """Memory that somebody's stale registration covers; the rest of what was allocated with it is kept as well."""
    stale = tracker.register(FAR, 4 * KIB, Purpose.KV_CACHE, "a cache that is gone")
    device.answer = stray = DeviceMemory(FAR + KIB, KIB)
    kept = dict[int, Allocation]()
    with pytest.raises(LedgerError, match="holds 'a cache that is gone'"):
        tracker.allocate_some({"a": KIB, "b": KIB}, Purpose.WEIGHTS, Notes(), kept.__setitem__)
    assert ([*kept], kept[0].memory, device.freed) == ([0, 1], stray, [])
    assert tracker.by_purpose() == {Purpose.KV_CACHE: 4 * KIB, Purpose.WEIGHTS: 2 * KIB}
    for made in kept.values():
        made.close()
    tracker.flush()
    assert device.freed == [made.memory for made in kept.values()]
    stale.close()
    assert tracker.total == 0


def test_of_several_one_that_another_has_is_not_kept(tracker: VramTracker, device: Device) -> None:
    first = tracker.allocate(4 * KIB, Purpose.WEIGHTS, "first")
    device.answer = first.memory.part(KIB, KIB)
    kept = dict[int, Allocation]()
    with pytest.raises(LedgerError, match="holds 'first'"):
        tracker.allocate_some({"a": KIB, "b": KIB}, Purpose.WEIGHTS, Notes(), kept.__setitem__)
    assert [(position, made.description) for position, made in kept.items()] == [(1, "b")]
    assert device.freed == []


def test_an_address_that_the_device_gives_twice_stays_with_the_first(tracker: VramTracker, device: Device) -> None:
    first = tracker.allocate(4 * KIB, Purpose.WEIGHTS, "first")
    device.answer = first.memory.part(KIB, KIB)
    with pytest.raises(LedgerError, match="holds 'first'"):
        tracker.allocate(KIB, Purpose.WEIGHTS, "second")
    assert (device.freed, tracker.total) == ([], 4 * KIB)


def test_memory_that_the_ledger_does_not_know_is_not_freed(tracker: VramTracker, device: Device) -> None:
    """Somebody hands the reclaim thread a line of another ledger; it goes on, and flush tells."""
    kept, dropped = (tracker.allocate(KIB, Purpose.WEIGHTS, "a tensor") for _ in range(2))
    other = VramTracker(device).allocate(KIB, Purpose.WEIGHTS, "of another ledger")
    tracker._reclaim.put(Dropped(other._entry))
    dropped.close()
    with pytest.raises(LedgerError, match=r"'of another ledger' .* is not in the ledger"):
        tracker.flush()
    assert device.freed == [dropped.memory]
    kept.close()
    tracker.flush()
    assert device.freed == [dropped.memory, kept.memory]
    assert tracker._thread is None or not tracker._outstanding


def test_out_of_memory_names_what_is_registered(tracker: VramTracker) -> None:
    tracker.register(FAR, KIB, Purpose.KV_CACHE, "the cache")
    with pytest.raises(OutOfDeviceMemoryError) as caught:
        tracker.allocate(1 << 40, Purpose.WEIGHTS, "everything")
    assert caught.value.breakdown == {"kv_cache": KIB}


def test_a_closed_tracker_lets_go_and_takes_no_more(tracker: VramTracker) -> None:
    registration = tracker.register(FAR, KIB, Purpose.KV_CACHE, "the cache")
    tracker.close()
    with pytest.raises(ClosedError):
        tracker.register(2 * FAR, KIB, Purpose.KV_CACHE, "another")
    registration.close()
    assert tracker.total == 0


# The report


def test_the_report_tells_registered_memory_apart(tracker: VramTracker) -> None:
    held: list[Allocation] = [tracker.allocate(2 << 20, Purpose.WEIGHTS, "blk.0")]
    tracker.register(FAR, 8 << 20, Purpose.KV_CACHE, "the cache")
    tracker.register(2 * FAR, 1 << 20, Purpose.WEIGHTS, "the head")
    lines = tracker.report().splitlines()
    assert [line.split() for line in lines[1:5]] == [
        ["weights", "3.0", "MiB", "2"],
        ["kv_cache", "8.0", "MiB", "1"],
        ["total", "11.0", "MiB", "3"],
        ["registered", "9.0", "MiB", "2"],
    ]
    assert lines[5] == "largest:"
    assert [line.split("MiB  ")[1] for line in lines[6:]] == [
        "the cache (registered)",
        "blk.0",
        "the head (registered)",
    ]
    assert len(held) == 1


class CountedLock:
    """A lock that fails where a thread would wait for itself, and counts."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.taken = 0

    def __enter__(self) -> None:
        assert self.lock.acquire(timeout=1), "the lock is not free"
        self.taken += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.lock.release()


def test_a_picture_of_the_ledger_takes_the_lock_once(tracker: VramTracker) -> None:
    registration = tracker.register(FAR, KIB, Purpose.KV_CACHE, "the cache")
    lock = CountedLock()
    tracker._lock = lock  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    for number, look in enumerate((tracker.report, tracker.by_purpose, lambda: tracker.total, tracker.reconcile)):
        assert look()
        assert lock.taken == number + 1
    registration.close()


def allocate_often(tracker: VramTracker, number: int) -> None:
    for turn in range(TURNS):
        tracker.allocate(KIB, Purpose.WEIGHTS, f"turn {turn} of thread {number}").close()


def register_often(tracker: VramTracker, number: int) -> None:
    for turn in range(TURNS):
        address = FAR + (number * TURNS + turn) * KIB
        with tracker.register(address, KIB, Purpose.KV_CACHE, "a block"), pytest.raises(LedgerError):
            tracker.register(address, 1, Purpose.KV_CACHE, "the same block")


def check_report(tracker: VramTracker) -> None:
    rows = dict(re.findall(r"^(\w+) .* (\d+)$", tracker.report(), re.MULTILINE))
    registered, total = int(rows.pop("registered", 0)), int(rows.pop("total"))
    assert registered == int(rows.get("kv_cache", 0)) <= WRITERS
    assert sum(map(int, rows.values())) == total


class WatchedLedger(Ledger):
    """Notes each use of it outside the lock."""

    def __init__(self, lock: threading.Lock) -> None:
        super().__init__("host")
        self.lock = lock
        self.unlocked: list[str] = []

    def note(self, use: str) -> None:
        if not self.lock.locked():
            self.unlocked.append(use)

    def __iter__(self) -> Iterator[Entry]:
        self.note("iter")
        return super().__iter__()

    def __contains__(self, entry: Entry) -> bool:
        self.note("contains")
        return super().__contains__(entry)

    def overlapping(self, memory: DeviceMemory) -> Entry | None:
        self.note("overlapping")
        return super().overlapping(memory)

    def add(self, entry: Entry) -> None:
        self.note("add")
        super().add(entry)

    def remove(self, entry: Entry) -> None:
        self.note("remove")
        super().remove(entry)


def test_the_ledger_is_used_under_the_lock_only(tracker: VramTracker) -> None:
    ledger = tracker._ledger = WatchedLedger(tracker._lock)
    allocation = tracker.allocate(KIB, Purpose.WEIGHTS, "a tensor")
    with tracker.register(FAR, KIB, Purpose.KV_CACHE, "the cache"), pytest.raises(ResidencyError):
        tracker.verify_residency()
    tracker.verify_residency()
    assert tracker.report()
    assert tracker.reconcile().within
    allocation.close()
    tracker.flush()
    assert (tracker.total, ledger.unlocked) == (0, [])


def test_many_threads_allocate_register_and_look(tracker: VramTracker, device: Device) -> None:
    """In every report the lines add up, and only registered memory is there as a cache."""
    start, stop = threading.Barrier(2 * WRITERS + 2), threading.Event()

    def write(work: Callable[[VramTracker, int], None], number: int) -> None:
        start.wait(TIMEOUT)
        work(tracker, number)

    def look() -> None:
        start.wait(TIMEOUT)
        while not stop.is_set():
            check_report(tracker)

    with ThreadPoolExecutor(2 * WRITERS + 2) as executor:
        looking = [executor.submit(look) for _ in range(2)]
        writing = [
            executor.submit(write, work, number)
            for number in range(WRITERS)
            for work in (allocate_often, register_often)
        ]
        wait(writing, TIMEOUT)
        stop.set()
        for future in [*writing, *looking]:
            future.result(TIMEOUT)
    tracker.flush()
    assert (tracker.total, len(device.freed)) == (0, WRITERS * TURNS)
