"""The ledger of device memory: what it says, and that memory is freed when nothing can use it any more, not before."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator

import anyio
import pytest

from asyncload.device import DeviceMemory, HostDevice
from asyncload.device._host_stream import PassedAll
from asyncload.errors import ClosedError, DeviceError, OutOfDeviceMemoryError
from asyncload.memory import Allocation, Purpose, VramTracker

TIMEOUT = 60.0
KIB = 1 << 10


class TroubledDevice(HostDevice):
    """Counts barriers and frees, and fails in them as told."""

    def __init__(self) -> None:
        super().__init__(total_bytes=64 << 20, poison=True)
        self.barriers = 0
        self.freed: list[DeviceMemory] = []
        self.broken: Exception | None = None
        self.fail_frees = 0
        self.freeing: set[str] = set()
        self.barrier_taken = threading.Event()
        self.when_full: Callable[[], object] = lambda: None
        self.when_freed: Callable[[], object] = lambda: None
        self.answer: DeviceMemory | None = None

    def allocate(self, nbytes: int) -> DeviceMemory:
        try:
            return self.answer or super().allocate(nbytes)
        except OutOfDeviceMemoryError:
            self.when_full()
            raise

    def barrier(self) -> PassedAll:
        self.barriers += 1
        if self.broken is not None:
            raise self.broken
        barrier = super().barrier()
        self.barrier_taken.set()
        return barrier

    def free(self, memory: DeviceMemory) -> None:
        self.freeing.add(threading.current_thread().name)
        if self.fail_frees:
            self.fail_frees -= 1
            raise DeviceError("no free", device="host", code="BROKEN")
        if self.answer is None:
            super().free(memory)
        self.freed.append(memory)
        self.when_freed()

    @property
    def used(self) -> int:
        return self.info.total_bytes - self.memory().free


@pytest.fixture
def device() -> Iterator[TroubledDevice]:
    device = TroubledDevice()
    yield device
    device.close()


@pytest.fixture
def tracker(device: TroubledDevice) -> Iterator[VramTracker]:
    tracker = VramTracker(device)
    yield tracker
    tracker.close()


def allocate(tracker: VramTracker, nbytes: int = KIB, purpose: Purpose = Purpose.WEIGHTS) -> Allocation:
    return tracker.allocate(nbytes, purpose, f"{nbytes} bytes")


def thread_of(tracker: VramTracker) -> threading.Thread:
    assert tracker._thread is not None
    return tracker._thread


def on_a_thread(function: Callable[[], object]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join(TIMEOUT)
    assert not thread.is_alive()


def flush_on_a_thread(tracker: VramTracker) -> threading.Event:
    flushed = threading.Event()

    def flush() -> None:
        tracker.flush()
        flushed.set()

    threading.Thread(target=flush).start()
    return flushed


# The ledger


def test_an_allocation_says_what_it_is(tracker: VramTracker, device: TroubledDevice) -> None:
    allocation = tracker.allocate(3 * KIB, Purpose.SCRATCH, "for a layer")
    assert allocation.memory == DeviceMemory(allocation.address, 3 * KIB)
    assert (allocation.nbytes, allocation.purpose, allocation.description) == (3 * KIB, "scratch", "for a layer")
    assert repr(allocation) == f"Allocation(3072 bytes at {allocation.address:#x}, scratch, 'for a layer')"
    assert device.used == 3 * KIB


def test_what_is_unused_is_freed_without_asking_the_device(tracker: VramTracker, device: TroubledDevice) -> None:
    allocation, other = allocate(tracker), allocate(tracker)
    memory = allocation.memory
    device.broken = DeviceError("no barrier", device="host", code="BROKEN")
    other.close()
    allocation.close(unused=True)
    with pytest.raises(DeviceError, match="no barrier"):
        tracker.flush()
    assert device.freed == [memory]
    assert tracker.total == KIB
    device.broken = None
    tracker.flush()
    assert tracker.total == 0


def test_the_ledger_adds_up(tracker: VramTracker, device: TroubledDevice) -> None:
    assert (tracker.total, tracker.by_purpose()) == (0, {})
    held = [
        allocate(tracker, 5 * KIB),
        allocate(tracker, 7 * KIB),
        allocate(tracker, 2 * KIB, Purpose.KV_CACHE),
        allocate(tracker, 0),
    ]
    assert tracker.total == device.used == 14 * KIB
    assert tracker.by_purpose() == {Purpose.WEIGHTS: 12 * KIB, Purpose.KV_CACHE: 2 * KIB}
    held[0].close()
    tracker.flush()
    assert tracker.total == device.used == 9 * KIB
    assert tracker.by_purpose() == {"weights": 7 * KIB, "kv_cache": 2 * KIB}


def test_the_report_is_a_table(tracker: VramTracker) -> None:
    assert tracker.report().splitlines()[1].split() == ["total", "0", "B", "0"]
    held = [tracker.allocate((number + 1) << 20, Purpose.WEIGHTS, f"blk.{number}.weight") for number in range(7)]
    held.append(tracker.allocate(512, Purpose.SCRATCH, "a buffer"))
    lines = tracker.report().splitlines()
    assert lines[0].split() == ["host", "size", "allocations"]
    assert [line.split() for line in lines[1:4]] == [
        ["weights", "28.0", "MiB", "7"],
        ["scratch", "512", "B", "1"],
        ["total", "28.0", "MiB", "8"],
    ]
    assert lines[4] == "largest:"
    assert [line.split()[-1] for line in lines[5:]] == [f"blk.{number}.weight" for number in (6, 5, 4, 3, 2)]


def test_the_ledger_can_be_read_while_memory_comes_and_goes(tracker: VramTracker, device: TroubledDevice) -> None:
    stop = threading.Event()
    totals: list[int] = []

    def read() -> None:
        while not stop.is_set():
            totals.append(tracker.total)
            assert sum(tracker.by_purpose().values()) % KIB == 0
            assert tracker.report().startswith("host")

    readers = [threading.Thread(target=read) for _ in range(2)]
    writers = [threading.Thread(target=lambda: [allocate(tracker) for _ in range(200)]) for _ in range(4)]
    for thread in [*readers, *writers]:
        thread.start()
    for thread in writers:
        thread.join(TIMEOUT)
    stop.set()
    for thread in readers:
        thread.join(TIMEOUT)
    tracker.flush()
    assert (tracker.total, device.used, len(device.freed)) == (0, 0, 800)
    assert all(0 <= total <= 800 * KIB for total in totals)


def test_out_of_memory_carries_the_breakdown(tracker: VramTracker) -> None:
    held = [allocate(tracker, 40 << 20), allocate(tracker, 8 << 20, Purpose.SLOTS)]
    with pytest.raises(OutOfDeviceMemoryError) as caught:
        tracker.allocate(20 << 20, Purpose.WORKSPACE, "blk.7.ffn_up.weight")
    error = caught.value
    assert isinstance(error, MemoryError)
    assert (error.needed, error.available, error.device) == (20 << 20, 16 << 20, "host")
    assert error.breakdown == {"weights": 40 << 20, "slots": 8 << 20}
    assert str(error) == (
        "host: 20.0 MiB needed for workspace (blk.7.ffn_up.weight), 16.0 MiB free; "
        "held here: 40.0 MiB weights, 8.0 MiB slots"
    )
    assert isinstance(error.__cause__, OutOfDeviceMemoryError)
    assert tracker.total == sum(allocation.nbytes for allocation in held)


def test_what_was_dropped_is_waited_for_before_memory_is_short(tracker: VramTracker, device: TroubledDevice) -> None:
    with device.hold() as work:
        allocate(tracker, 60 << 20).close()
        device.when_full = work.set
        assert allocate(tracker, 50 << 20).nbytes == 50 << 20


def test_empty_memory_costs_nothing(tracker: VramTracker, device: TroubledDevice) -> None:
    empty = [allocate(tracker, 0) for _ in range(3)]
    assert [allocation.address for allocation in empty] == [0, 0, 0]
    empty.pop().close()
    empty.clear()
    tracker.flush()
    assert (tracker.total, device.freed) == (0, [])


def test_an_address_is_recorded_once(tracker: VramTracker, device: TroubledDevice) -> None:
    first = allocate(tracker)
    device.answer = first.memory  # a driver gone wrong
    with pytest.raises(DeviceError, match="holds '1024 bytes'"):
        tracker.allocate(KIB, Purpose.SLOTS, "another")
    assert tracker.by_purpose() == {"weights": KIB}


# Freeing


def test_memory_goes_when_it_is_closed_or_dropped(tracker: VramTracker, device: TroubledDevice) -> None:
    held = [allocate(tracker) for _ in range(4)]
    memories = [allocation.memory for allocation in held]
    held[0].close()
    held[0].close()
    on_a_thread(held[1].close)
    del held[1]
    on_a_thread(lambda: held.pop(1))
    tracker.flush()
    assert device.freed == memories[:3]
    held.clear()
    tracker.flush()
    assert device.freed == memories
    assert (tracker.total, device.used) == (0, 0)
    assert device.freeing == {"asyncload-reclaim"}


def test_closing_on_many_threads_frees_once(tracker: VramTracker, device: TroubledDevice) -> None:
    for _ in range(50):
        allocation = allocate(tracker)
        start = threading.Barrier(4)

        def close(allocation: Allocation = allocation, start: threading.Barrier = start) -> None:
            start.wait(TIMEOUT)
            allocation.close()

        threads = [threading.Thread(target=close) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT)
    tracker.flush()
    assert len(device.freed) == 50


def test_memory_stays_while_enqueued_work_uses_it(tracker: VramTracker, device: TroubledDevice) -> None:
    """The work of another library, that the ledger has never heard of; and of a stream."""
    stream = device.stream()
    for hold in (device.hold, stream.hold):
        allocation = allocate(tracker)
        address = allocation.address
        ctypes.memset(address, 0x11, KIB)
        with hold() as work:
            allocation.close()  # returns at once, though the work has not ended
            del allocation
            flushed = flush_on_a_thread(tracker)
            assert device.barrier_taken.wait(TIMEOUT)
            device.barrier_taken.clear()
            device.stream().close()  # other work comes and goes
            assert not flushed.is_set()
            assert ctypes.string_at(address, KIB) == b"\x11" * KIB
            assert tracker.total == device.used == KIB
            work.set()
            assert flushed.wait(TIMEOUT)
        assert ctypes.string_at(address, KIB) == b"\xa5" * KIB
        assert tracker.total == device.used == 0


def test_work_enqueued_after_the_drop_is_not_waited_for(tracker: VramTracker, device: TroubledDevice) -> None:
    allocate(tracker).close()
    assert device.barrier_taken.wait(TIMEOUT)
    with device.hold():
        tracker.flush()
        assert device.used == 0


def test_what_was_dropped_meanwhile_shares_a_barrier(tracker: VramTracker, device: TroubledDevice) -> None:
    held = [allocate(tracker) for _ in range(100)]
    with device.hold():
        held.pop().close()
        assert device.barrier_taken.wait(TIMEOUT)  # what follows waits behind it
        held.clear()
    tracker.flush()
    assert device.used == 0
    assert device.barriers == 2


def test_the_garbage_collector_may_run_inside_a_locked_region(tracker: VramTracker, device: TroubledDevice) -> None:
    class Cycle:
        def __init__(self) -> None:
            self.allocation = allocate(tracker)
            self.itself = self

    Cycle()
    with tracker._lock:
        gc.collect()
    tracker.flush()
    assert device.used == 0


@pytest.mark.anyio
async def test_dropping_on_an_event_loop_never_blocks(tracker: VramTracker, device: TroubledDevice) -> None:
    allocation = [await anyio.to_thread.run_sync(allocate, tracker)]
    with device.hold(), tracker._lock:  # whoever took the lock here, or waited, would never come back
        allocation.clear()
    await anyio.to_thread.run_sync(tracker.flush)
    assert device.used == 0


def test_flush_without_anything_dropped_returns(tracker: VramTracker, device: TroubledDevice) -> None:
    with device.hold():
        tracker.flush()
        kept = allocate(tracker)
        tracker.flush()
        assert device.barriers == 0
        assert tracker.total == kept.nbytes


def test_an_address_may_be_handed_out_again_as_soon_as_it_is_freed(
    tracker: VramTracker, device: TroubledDevice
) -> None:
    first, again = allocate(tracker), list[Allocation]()

    def allocate_again() -> None:
        device.when_freed = lambda: None
        again.append(tracker.allocate(KIB, Purpose.SLOTS, "another"))

    device.answer = first.memory
    device.when_freed = allocate_again
    first.close()
    tracker.flush()
    assert tracker.by_purpose() == {"slots": KIB}
    assert again[0].address == first.address
    again[0].close()
    tracker.flush()
    assert tracker.total == 0


# Trouble


@pytest.mark.parametrize("trouble", [DeviceError("no barrier", device="host", code="BROKEN"), ZeroDivisionError()])
def test_memory_of_which_the_device_says_nothing_is_kept(
    tracker: VramTracker, device: TroubledDevice, caplog: pytest.LogCaptureFixture, trouble: Exception
) -> None:
    device.broken = trouble
    allocate(tracker).close()
    for _ in range(2):
        with pytest.raises(type(trouble)):
            tracker.flush()
        assert tracker.total == device.used == KIB
    assert "could not wait for the device" in caplog.text
    device.broken = None
    tracker.flush()  # tries again; what it has told of is told
    assert (tracker.total, device.used, len(device.freed)) == (0, 0, 1)


def test_a_failed_free_is_told_and_the_others_go_on(
    tracker: VramTracker, device: TroubledDevice, caplog: pytest.LogCaptureFixture
) -> None:
    held = [allocate(tracker, KIB), allocate(tracker, 2 * KIB)]
    lost = held[0].memory
    device.fail_frees = 1
    for allocation in held:
        allocation.close()
    with pytest.raises(DeviceError, match="no free"):
        tracker.flush()
    assert "could not free 1024 bytes (1024 bytes)" in caplog.text
    assert tracker.total == device.used == KIB  # it is still taken, and the ledger says so
    tracker.flush()  # told once
    assert tracker.total == KIB
    device.free(lost)


def test_the_thread_outlives_a_device_that_cannot_say_what_it_has_freed(
    tracker: VramTracker, device: TroubledDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def free_all(_memory: object) -> dict[DeviceMemory, Exception]:
        raise ZeroDivisionError

    lost, kept = allocate(tracker), allocate(tracker)
    with monkeypatch.context() as patch:
        patch.setattr(device, "free_all", free_all)
        memory = lost.memory
        lost.close()
        with pytest.raises(ZeroDivisionError):
            tracker.flush()
    assert tracker.total == 2 * KIB  # it may be free or not: it counts, and is not used
    kept.close()
    tracker.flush()
    assert tracker.total == KIB
    device.free(memory)


def test_the_thread_outlives_errors_that_are_not_ours(tracker: VramTracker, device: TroubledDevice) -> None:
    original = device.free

    def free(memory: DeviceMemory) -> None:
        device.free = original  # type: ignore[method-assign]
        raise ZeroDivisionError

    kept = allocate(tracker)
    device.free = free  # type: ignore[method-assign]
    allocate(tracker).close()
    with pytest.raises(ZeroDivisionError):
        tracker.flush()
    kept.close()
    tracker.flush()
    assert tracker.total == KIB


# Ending


def test_the_thread_runs_until_the_tracker_is_closed(device: TroubledDevice) -> None:
    tracker = VramTracker(device)
    thread = thread_of(tracker)
    assert (thread.name, thread.daemon) == ("asyncload-reclaim", True)
    for _ in range(3):
        allocate(tracker).close()
        tracker.flush()
        assert thread_of(tracker) is thread
    tracker.close()
    thread.join(TIMEOUT)
    assert not thread.is_alive()


def test_allocations_outlive_the_closed_tracker_and_device(device: TroubledDevice) -> None:
    tracker = VramTracker(device)
    dropped, kept = allocate(tracker), allocate(tracker)
    thread = thread_of(tracker)
    dropped.close()
    tracker.close()
    device.close()
    assert tracker.total == device.used == KIB
    with pytest.raises(ClosedError):
        allocate(tracker)
    ctypes.memset(kept.address, 0x22, KIB)
    del kept
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    assert tracker.total == device.used == 0
    tracker.close()


EXIT = """
    import sys
    from asyncload.device import HostDevice
    from asyncload.memory import Purpose, VramTracker

    device = HostDevice()
    tracker = VramTracker(device)
    sys.held = tracker.allocate(4096, Purpose.WEIGHTS, "held to the end")
    cycle = [tracker.allocate(4096, Purpose.WEIGHTS, "in a cycle")]
    cycle.append(cycle)
    held = tracker.allocate(4096, Purpose.WEIGHTS, "dropped while a kernel runs")
    device.hold()
    del held
"""


def test_the_interpreter_ends_with_memory_alive() -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(EXIT)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
        env={"PYTHONPATH": ":".join(filter(None, sys.path))},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
