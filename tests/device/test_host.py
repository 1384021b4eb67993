"""The host device: the contract, and what it has for tests: slowness, faults, poison, and an eye on its callers."""

from __future__ import annotations

import ctypes
import gc
import mmap
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate

import pytest

from asyncload.device import Device, DeviceMemory, HostDevice, Stream, _host_stream, _pages, default_device, open_device
from asyncload.device._host_stream import CopyEngine, HostStream
from asyncload.errors import CopyError, DeviceError, DeviceNotFoundError, OutOfDeviceMemoryError
from asyncload.testing import DeviceConformance, RaceDevice, StreamProxy
from tests.device.mappings import mapped

POISON = 0xA5
TIMEOUT = 60.0


class TestHostDevice(DeviceConformance):
    @pytest.fixture
    def device(self) -> Iterator[HostDevice]:
        device = HostDevice()
        yield device
        device.close()

    @contextmanager
    def hold(self, device: Device, stream: Stream | None) -> Generator[Callable[[], None]]:
        assert isinstance(device, HostDevice)
        assert stream is None or isinstance(stream, HostStream)
        with device.hold() if stream is None else stream.hold() as held:
            yield held.set


class TestSlowHostDevice(TestHostDevice):
    """The same, with copies in pieces at a bandwidth, each a little late, and with poison."""

    @pytest.fixture
    def device(self) -> Iterator[HostDevice]:
        device = HostDevice(bandwidth=2e9, latency=1e-4, poison=True)
        yield device
        device.close()


class TestProxies(DeviceConformance):
    """The same behind what doubles are made from."""

    @pytest.fixture
    def device(self) -> Iterator[RaceDevice]:
        device = RaceDevice(HostDevice())
        yield device
        device.close()

    @contextmanager
    def hold(self, device: Device, stream: Stream | None) -> Generator[Callable[[], None]]:
        assert isinstance(device, RaceDevice)
        assert isinstance(device.inner, HostDevice)
        assert stream is None or isinstance(stream, StreamProxy)
        inner = device.inner if stream is None else stream.inner
        assert isinstance(inner, HostDevice | HostStream)
        with inner.hold() as held:
            yield held.set


@pytest.fixture
def make() -> Iterator[Callable[..., HostDevice]]:
    made: list[HostDevice] = []

    def make(**options: object) -> HostDevice:
        made.append(HostDevice(**options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for device in made:
        device.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("asyncload-host")]


Make = Callable[..., HostDevice]


def read(device: HostDevice, memory: DeviceMemory) -> bytes:
    content = bytearray(memory.nbytes)
    device.download(memory, 0, memoryview(content))
    return bytes(content)


def test_names() -> None:
    assert isinstance(open_device("host"), HostDevice)
    assert default_device() in {"host", "cuda:0"}
    for name in ("hosts", "host:0", "cuda:", "cuda:x", "cuda:-1", "", "CUDA"):
        with pytest.raises(DeviceNotFoundError) as caught:
            open_device(name)
        assert caught.value.device == name


# Slowness


def duration_of(device: HostDevice, streams: int, copies: int, nbytes: int) -> float:
    """Seconds that ``copies`` copies take on each of some streams, from the first enqueued to the last event."""
    opened = [device.stream() for _ in range(streams)]
    staging, memory = device.staging(nbytes), device.allocate(nbytes)
    begin = time.perf_counter()
    for _ in range(copies):
        for stream in opened:
            stream.upload(memory, 0, staging, 0, nbytes)
    for event in [stream.record() for stream in opened]:
        event.synchronize()
    end = time.perf_counter()
    for stream in opened:
        stream.close()
    staging.close()
    device.free(memory)
    return end - begin


@pytest.mark.parametrize(("streams", "copies"), [(1, 1), (1, 8), (4, 2)])
def test_all_streams_share_the_bandwidth(make: Make, streams: int, copies: int) -> None:
    nbytes = 1 << 20
    ideal = streams * copies * nbytes / 50e6
    assert duration_of(make(bandwidth=50e6), streams, copies, nbytes) >= ideal


def test_latency_passes_before_each_copy(make: Make) -> None:
    assert duration_of(make(latency=0.02), 1, 4, 4096) >= 4 * 0.02


def test_streams_hide_latency_and_not_bandwidth() -> None:
    """By the timetable that the copies keep to: waiting goes on side by side, moving does not."""
    memory = bytearray(8192)
    both = DeviceMemory(ctypes.addressof(ctypes.c_char.from_buffer(memory)), 8192)
    target, source = both.part(4096, 4096), both.part(0, 4096)
    engine = CopyEngine("host", None, latency=0.01)
    copies = [engine.accept(target, source) for _ in range(2)]
    ends = [engine.perform(copy, 0.0) for copy in copies]  # each is the first of its stream
    assert ends == [copy.enqueued + 0.01 for copy in copies]
    earliest = ends[1] + 1e-3
    assert engine.perform(engine.accept(target, source), earliest) >= earliest + 0.01

    engine = CopyEngine("host", 4096 / 0.01, latency=0.0)
    copies = [engine.accept(target, source) for _ in range(3)]
    for copy in copies:
        copy.enqueued = copies[0].enqueued  # however long this thread was interrupted between them
    ends = [engine.perform(copy, 0.0) for copy in copies]
    assert ends == list(accumulate(3 * [4096 / (4096 / 0.01)], initial=copies[0].enqueued))[1:]


def test_speed_can_be_set_while_it_works(make: Make) -> None:
    device = make(bandwidth=1.0, latency=1e6)
    device.bandwidth, device.latency = None, 0.0
    assert (device.bandwidth, device.latency) == (None, 0.0)
    staging, memory, stream = device.staging(4096), device.allocate(4096), device.stream()
    stream.upload(memory, 0, staging, 0, 4096)
    stream.record().synchronize()


@pytest.mark.parametrize("bandwidth", [None, 1e9])
def test_a_copy_reads_its_source_when_its_turn_has_come(make: Make, bandwidth: float | None) -> None:
    device = make(bandwidth=bandwidth)
    staging, memory, stream = device.staging(4096), device.allocate(4096), device.stream()
    staging.view[:] = b"a" * 4096
    with stream.hold():
        stream.upload(memory, 0, staging, 0, 4096)
        staging.view[:] = b"b" * 4096  # too early: no event has passed
    stream.record().synchronize()
    assert read(device, memory) == b"b" * 4096


def test_a_slow_copy_reads_its_source_until_shortly_before_it_ends(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    nbytes = 16 << 20
    device = make(bandwidth=1e9)
    staging, memory, stream = device.staging(nbytes), device.allocate(nbytes), device.stream()
    moments: list[float] = []

    def refill_before_the_last_piece(moment: float) -> None:
        moments.append(moment)
        if len(moments) == 4:
            staging.view[:] = b"b" * nbytes

    monkeypatch.setattr(_host_stream, "_sleep_until", refill_before_the_last_piece)
    stream.upload(memory, 0, staging, 0, nbytes)
    stream.record().synchronize()
    assert read(device, memory) == bytes(12 << 20) + b"b" * (4 << 20)
    assert moments[3] - moments[0] == pytest.approx((12 << 20) / 1e9)


# Faults


@pytest.mark.parametrize("number", [1, 2, 5])
def test_the_event_after_a_failed_copy_reports_it_once(make: Make, number: int) -> None:
    device = make()
    staging, memory, stream, other = device.staging(8), device.allocate(8), device.stream(), device.stream()
    staging.view[:] = b"12345678"
    for _ in range(3):
        stream.upload(memory, 0, staging, 0, 1)
    stream.record().synchronize()
    device.fail_upload(number)
    for position in range(8):
        stream.upload(memory, position, staging, position, 1)
    event = stream.record()
    for _ in range(2):
        with pytest.raises(CopyError) as caught:
            event.synchronize()
        assert caught.value.device == "host"
        with pytest.raises(CopyError):
            event.done()
    stream.record().synchronize()
    other.record().synchronize()
    device.barrier().synchronize()
    expected = bytearray(b"12345678")
    expected[number - 1] = 0 if number > 1 else expected[0]  # the first byte was there before
    assert read(device, memory) == expected


def test_a_copy_can_be_refused(make: Make) -> None:
    device = make()
    staging, memory, stream = device.staging(8), device.allocate(8), device.stream()
    device.fail_upload(2, refused=True)
    stream.upload(memory, 0, staging, 0, 8)
    with pytest.raises(CopyError):
        stream.upload(memory, 0, staging, 0, 8)
    stream.upload(memory, 0, staging, 0, 8)
    stream.record().synchronize()


def test_capacity_is_exact(make: Make) -> None:
    device = make(total_bytes=10_000)
    assert device.info.total_bytes == 10_000
    kept = device.allocate(6000)
    with pytest.raises(OutOfDeviceMemoryError) as caught:
        device.allocate(4001)
    assert (caught.value.needed, caught.value.available) == (4001, 4000)
    device.free(device.allocate(4000))
    device.free(kept)
    assert (device.memory().free, device.memory().total) == (10_000, 10_000)


def test_what_is_not_taken_of_several_is_free_again(make: Make) -> None:
    device, sizes = make(total_bytes=10_000), [1000, 0, 2000, 3000]
    given: list[int] = []

    class Refusing:
        def give(self, address: int) -> bool:
            given.append(address)
            if len(given) == 3:
                raise ZeroDivisionError
            return False

    made = device.allocate_some(sizes, Refusing())
    assert [memory.address for memory in made] == given
    assert (sum(memory.nbytes for memory in made), device.memory().free) == (3000, 7000)
    rest = made[2].address + mmap.PAGESIZE
    assert [mapped(made[2].address), mapped(rest)] == [True, False]
    assert device.free_all(made) == {}

    def refuse(nbytes: int) -> None:
        if nbytes == 3000:
            raise ZeroDivisionError

    device.on_allocate = refuse
    with pytest.raises(ZeroDivisionError):
        device.allocate_all(sizes)
    with pytest.raises(OutOfDeviceMemoryError) as caught:
        device.allocate_all([1000, 9001])
    assert (caught.value.needed, caught.value.available) == (9001, 9000)
    assert device.memory().free == 10_000


def test_memory_is_free_once_it_is_unmapped(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    device = make(total_bytes=10_000)
    made, free = device.allocate_all([1000, 0, 2000]), list[int]()
    unmap_pages = _pages._unmap

    def note(address: int, nbytes: int) -> None:
        free.append(device.memory().free)
        unmap_pages(address, nbytes)

    monkeypatch.setattr(_pages, "_unmap", note)
    assert device.free_all(made) == {}
    assert free == [7000]  # and both of them in one call
    assert device.memory().free == 10_000


def test_several_are_allocated_and_freed_each_by_what_a_double_says() -> None:
    allocated, freed = list[int](), list[DeviceMemory]()

    class Double(HostDevice):
        def allocate(self, nbytes: int) -> DeviceMemory:
            allocated.append(nbytes)
            return super().allocate(nbytes)

        def free(self, memory: DeviceMemory) -> None:
            freed.append(memory)
            super().free(memory)

    device = Double()
    made = device.allocate_all([1, 2, 3])
    assert device.free_all(made) == {}
    assert (allocated, freed) == ([1, 2, 3], made)


def test_what_is_too_much_at_once_is_mapped_one_by_one(make: Make) -> None:
    device, sizes = make(total_bytes=1 << 62), [1000, 0, 2000, 1 << 60]
    given: list[int] = []

    class Notes:
        def give(self, address: int) -> bool:
            given.append(address)
            return False

    made = device.allocate_some(sizes, Notes())
    assert [memory.nbytes for memory in made] == sizes[:3]
    assert [memory.address for memory in made] == given
    assert device.free_all(made) == {}
    with pytest.raises(OutOfDeviceMemoryError) as caught:
        device.allocate_all(sizes)
    assert (caught.value.needed, caught.value.available) == (1 << 60, (1 << 62) - 3000)
    assert isinstance(caught.value.__cause__, MemoryError)
    assert device.memory().free == 1 << 62


def test_several_are_mapped_at_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    device, sizes, mapped_at_once = make(total_bytes=100_000), [1000, 0, 50_000, 40_000, 10_000], list[int]()
    map_pages = _pages._map

    def note(nbytes: int) -> int:
        mapped_at_once.append(nbytes)
        return map_pages(nbytes)

    monkeypatch.setattr(_pages, "_map", note)
    made = device.allocate_all(sizes[:4])
    assert mapped_at_once == [sum(-(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE for nbytes in sizes[:4])]
    assert device.free_all(made) == {}
    with pytest.raises(OutOfDeviceMemoryError) as caught:
        device.allocate_all(sizes)
    assert (caught.value.needed, caught.value.available) == (10_000, 9000)
    assert device.memory().free == 100_000


def test_what_a_device_leaves_is_unmapped_with_it() -> None:
    device = HostDevice(poison=True)
    kept, freed = device.allocate(5000), device.allocate(3000)
    device.free(freed)
    assert [mapped(kept.address), mapped(freed.address)] == [True, True]
    del device
    gc.collect()
    assert [mapped(kept.address), mapped(freed.address)] == [False, False]


def test_threads_never_share_the_last_bytes(make: Make) -> None:
    device = make(total_bytes=8 * 4096)
    outcomes: list[bool] = []
    start = threading.Barrier(16)

    def allocate() -> None:
        start.wait(TIMEOUT)
        try:
            device.allocate(4096)
        except OutOfDeviceMemoryError:
            outcomes.append(False)
        else:
            outcomes.append(True)

    threads = [threading.Thread(target=allocate) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert sorted(outcomes) == [False] * 8 + [True] * 8
    assert device.memory().free == 0


def test_allocations_can_be_watched_and_refused(make: Make) -> None:
    sizes: list[int] = []
    device = make(on_allocate=sizes.append)
    device.allocate(7)
    device.allocate(0)

    def refuse(nbytes: int) -> None:
        raise OutOfDeviceMemoryError("no", device="host", needed=nbytes, available=0, breakdown={})

    device.on_allocate = refuse
    with pytest.raises(OutOfDeviceMemoryError):
        device.allocate(1)
    assert sizes == [7, 0]


# An eye on the callers


def test_memory_under_a_copy_cannot_be_given_back(make: Make) -> None:
    device = make(poison=True)
    staging, memory, stream = device.staging(8192), device.allocate(4096), device.stream()
    with stream.hold():
        stream.upload(memory, 0, staging, 4096, 4096)
        breaches: list[Callable[[], None]] = [
            partial(device.free, memory),
            staging.close,
            partial(staging.discard, 0, 4097),
            partial(staging.discard, 8191, 1),
        ]
        for breach in breaches:
            with pytest.raises(DeviceError, match="1 pieces of work still use it"):
                breach()
        staging.discard(0, 4096)
    stream.record().synchronize()
    staging.discard(0, 8192)
    staging.close()
    device.free(memory)


def test_a_failed_copy_lets_its_memory_go(make: Make) -> None:
    device = make()
    staging, memory, stream = device.staging(8), device.allocate(8), device.stream()
    device.fail_upload(1)
    stream.upload(memory, 0, staging, 0, 8)
    with pytest.raises(CopyError):
        stream.record().synchronize()
    staging.close()
    device.free(memory)


def test_freed_memory_is_poisoned(make: Make) -> None:
    device = make(poison=True)
    memory = device.allocate(5000)
    device.free(memory)
    assert set(ctypes.string_at(memory.address, 5000)) == {POISON}


def test_old_poisoned_memory_goes_back(make: Make) -> None:
    device = make(poison=True)
    for _ in range(3):
        device.free(device.allocate(40 << 20))
    assert sum(pages.nbytes for pages in device._quarantine) <= 64 << 20


def test_discarded_and_closed_staging_is_poisoned(make: Make) -> None:
    staging = make(poison=True).staging(8192)
    staging.view[:] = b"a" * 8192
    part = staging.view[:]
    staging.discard(100, 200)
    assert bytes(part) == b"a" * 100 + bytes([POISON]) * 200 + b"a" * (8192 - 300)
    staging.close()
    assert set(part) == {POISON}


def test_without_poison_nothing_is_overwritten(make: Make) -> None:
    staging = make().staging(8192)
    staging.view[:] = b"a" * 8192
    part = staging.view[:]
    staging.discard(100, 200)
    staging.close()
    assert set(part) == {ord("a")}


def test_a_thread_attaches_before_it_uses_a_stream(make: Make) -> None:
    device = make()
    staging, memory, stream = device.staging(8), device.allocate(8), device.stream()
    raised: list[str] = []

    def work() -> None:
        for use in (lambda: stream.upload(memory, 0, staging, 0, 8), stream.record):
            try:
                use()
            except DeviceError as error:
                raised.append(str(error))
        device.attach()
        stream.upload(memory, 0, staging, 0, 8)
        stream.record().synchronize()
        raised.append("attached")

    thread = threading.Thread(target=work, name="stray")
    thread.start()
    thread.join(TIMEOUT)
    assert raised == ["host: thread stray uses a stream and has not attached"] * 2 + ["attached"]


def test_closing_ends_all_threads(make: Make) -> None:
    device = make()
    streams = [device.stream() for _ in range(3)]
    names = {thread.name for thread in threading.enumerate()}
    assert {f"asyncload-host-stream{number}" for number in range(3)} <= names
    closers = [threading.Thread(target=stream.close) for stream in streams * 2]
    for closer in closers:
        closer.start()
    device.close()
    for closer in closers:
        closer.join(TIMEOUT)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("asyncload-host")]
    device.barrier().synchronize()


def test_a_barrier_finds_the_work_of_a_stream_that_is_being_closed(make: Make) -> None:
    device = make()
    stream = device.stream()
    with stream.hold() as held:
        closer = threading.Thread(target=stream.close)
        closer.start()
        barrier = device.barrier()
        assert not barrier.done()
        held.set()
        barrier.synchronize()
        closer.join(TIMEOUT)
        assert not closer.is_alive()
