"""What every device does, as tests: a backend's test class inherits from ``DeviceConformance``."""

from __future__ import annotations

import ctypes
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import pairwise
from random import Random

import pytest

from asyncload.device import Device, DeviceMemory, Residency, StagingMemory, Stream
from asyncload.errors import DeviceError, OutOfDeviceMemoryError, RangeError
from asyncload.testing._decode_conformance import DecodeConformance

__all__ = ["DeviceConformance", "Rig"]

_PAGE = 4096
_SIZES = (0, 1, _PAGE - 1, _PAGE, _PAGE + 1, (3 << 20) + 1)
_LARGE = 64 << 20  # bytes; a driver gives memory of its own to this, and not a piece of a block it has
_GUARD = 0xEE
_TIMEOUT = 60.0  # seconds; generous, as it only matters where something hangs
_THREADS = 8


def _content(nbytes: int, seed: int = 0) -> bytes:
    return Random(seed).randbytes(nbytes)  # noqa: S311 - data, not secrets


def _read(device: Device, memory: DeviceMemory) -> bytes:
    content = bytearray(memory.nbytes)
    device.download(memory, 0, memoryview(content))
    return bytes(content)


class Rig:
    """A device, one of its streams, and memory that ``close`` gives back."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.stream: Stream = device.stream()
        self._staged: list[StagingMemory] = []
        self._allocated: list[DeviceMemory] = []

    def stage(self, content: bytes) -> StagingMemory:
        """Makes staging memory with given content."""
        staging = self.device.staging(len(content))
        self._staged.append(staging)
        staging.view[:] = content
        return staging

    def allocate(self, nbytes: int) -> DeviceMemory:
        """Allocates device memory."""
        self._allocated.append(self.device.allocate(nbytes))
        return self._allocated[-1]

    def read(self, memory: DeviceMemory) -> bytes:
        """All bytes of device memory."""
        return _read(self.device, memory)

    def close(self) -> None:
        """Waits for the device and gives everything back."""
        self.device.barrier().synchronize()
        self.stream.close()
        for staging in self._staged:
            staging.close()
        for memory in self._allocated:
            self.device.free(memory)


class DeviceConformance(DecodeConformance, ABC):
    """The contract of ``asyncload.device.Device`` as tests.

    A subclass supplies the fixture ``device``, an open device that it closes afterwards, and ``hold``.
    """

    @abstractmethod
    def hold(self, device: Device, stream: Stream | None) -> AbstractContextManager[Callable[[], None]]:
        """Enqueues work on a stream that ends when the function is called that the block gets, or when the block ends.

        Without a stream it is the work of somebody else, which the device's own streams know nothing of.
        """

    @pytest.fixture
    def rig(self, device: Device) -> Iterator[Rig]:
        """The device with a stream, and with memory that is given back after the test."""
        rig = Rig(device)
        yield rig
        rig.close()

    # Memory

    def test_info(self, device: Device) -> None:
        info, memory = device.info, device.memory()
        assert info.name in {info.kind, f"{info.kind}:{info.index}"}
        assert info.model
        assert 0 < memory.free <= memory.total == info.total_bytes

    @pytest.mark.parametrize("nbytes", [1, 255, 256, 257, _PAGE + 1])
    def test_memory_is_aligned_and_apart(self, rig: Rig, nbytes: int) -> None:
        made = [rig.allocate(nbytes) for _ in range(5)]
        assert all(memory.nbytes == nbytes and memory.address > 0 and memory.address % 256 == 0 for memory in made)
        starts = sorted(memory.address for memory in made)
        assert all(after - before >= nbytes for before, after in pairwise(starts))

    def test_empty_memory_has_no_address(self, device: Device) -> None:
        memory = device.allocate(0)
        assert memory == DeviceMemory(0, 0)
        device.free(memory)
        device.free(memory)

    def test_freed_memory_is_the_devices_again(self, device: Device) -> None:
        nbytes = 64 << 20
        device.free(device.allocate(nbytes))  # a driver may take some for itself, once
        before, memory = device.memory().free, device.allocate(nbytes)
        assert before - device.memory().free >= nbytes
        device.free(memory)
        assert device.memory().free == before

    def test_only_what_was_allocated_can_be_freed(self, device: Device) -> None:
        memory = device.allocate(_PAGE)
        for wrong in (DeviceMemory(memory.address + 256, 256), DeviceMemory(memory.address, 256), DeviceMemory(0, 1)):
            with pytest.raises(DeviceError):
                device.free(wrong)
        device.free(memory)
        with pytest.raises(DeviceError):
            device.free(memory)

    def test_of_several_each_is_given_as_it_is_allocated_until_there_is_no_more(self, device: Device) -> None:
        given: list[int] = []

        class Notes:
            def give(self, address: int) -> bool:
                given.append(address)
                return len(given) % 2 == 0

        made = device.allocate_some([_PAGE, 0, _LARGE, 1 << 60, _PAGE], Notes())
        assert [memory.nbytes for memory in made] == [_PAGE, 0, _LARGE]
        assert given == [memory.address for memory in made]
        assert device.free_all(made) == {}
        assert device.allocate_some([], Notes()) == []

    def test_several_are_freed_at_once_but_for_what_was_not_allocated(self, device: Device) -> None:
        device.free(device.allocate(_LARGE))
        before = device.memory().free
        made = [device.allocate(nbytes) for nbytes in (_PAGE, 0, _LARGE)]
        wrong = DeviceMemory(made[2].address, _PAGE)
        failures = device.free_all([made[0], wrong, made[1], made[2]])
        assert [*failures] == [wrong]
        assert isinstance(failures[wrong], DeviceError)
        assert device.memory().free == before
        assert set(device.free_all(made)) == {made[0], made[2]}
        once = device.allocate(_PAGE)
        assert set(device.free_all([once, once])) == {once}
        assert device.memory().free == before
        assert device.free_all([]) == {}

    def test_too_much_memory_is_refused_and_nothing_breaks(self, device: Device) -> None:
        with pytest.raises(OutOfDeviceMemoryError) as caught:
            device.allocate(1 << 60)
        assert isinstance(caught.value, MemoryError)
        assert caught.value.needed == 1 << 60
        assert caught.value.available is not None
        assert 0 < caught.value.available <= device.info.total_bytes
        assert (caught.value.breakdown, caught.value.device) == ({}, device.info.name)
        device.free(device.allocate(_PAGE))

    def test_memory_outlives_the_device_object(self, rig: Rig) -> None:
        memory, content = rig.device.allocate(_PAGE), _content(_PAGE)
        rig.stream.upload(memory, 0, rig.stage(content), 0, _PAGE)
        rig.stream.close()
        rig.device.close()
        assert rig.read(memory) == content
        rig.device.barrier().synchronize()
        rig.device.free(memory)
        rig.device.close()

    # Where memory lies

    def test_allocated_memory_is_resident_and_so_is_each_part(self, rig: Rig) -> None:
        made = [rig.allocate(nbytes) for nbytes in (1, _PAGE, _LARGE)]
        for memory in made:
            last = memory.nbytes - 1
            for part in (memory, memory.part(0, 1), memory.part(last, 1), memory.part(last // 2, 1 + last // 3)):
                assert rig.device.residency(part) is Residency.DEVICE

    def test_host_memory_is_not_resident(self, rig: Rig) -> None:
        buffer = bytearray(_PAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        assert rig.device.residency(DeviceMemory(address, _PAGE)) is not Residency.DEVICE

    def test_staging_memory_is_not_resident(self, rig: Rig) -> None:
        staging = rig.stage(_content(_PAGE))
        assert rig.device.residency(DeviceMemory(staging.address, _PAGE)) is not Residency.DEVICE

    def test_empty_memory_is_not_resident(self, rig: Rig) -> None:
        for address in (0, rig.allocate(_PAGE).address):
            assert rig.device.residency(DeviceMemory(address, 0)) is Residency.UNKNOWN

    def test_a_range_that_leaves_its_allocation_is_not_resident(self, rig: Rig) -> None:
        memory = rig.allocate(_LARGE)
        for address in (memory.address, memory.address - _LARGE):
            assert rig.device.residency(DeviceMemory(address, 2 * _LARGE)) is not Residency.DEVICE

    def test_freed_memory_is_not_resident(self, device: Device) -> None:
        memory = device.allocate(_LARGE)
        device.free(memory)
        assert device.residency(memory) is Residency.UNKNOWN

    def test_a_thread_that_never_attached_can_ask(self, rig: Rig) -> None:
        memory, found = rig.allocate(_PAGE), list[Residency]()
        thread = threading.Thread(target=lambda: found.append(rig.device.residency(memory)))
        thread.start()
        thread.join(_TIMEOUT)
        assert found == [Residency.DEVICE]

    def test_the_memory_of_this_process_grows_by_what_it_allocates(self, device: Device) -> None:
        before = device.process_memory()
        memory = device.allocate(_LARGE)
        after = device.process_memory()
        device.free(memory)
        if before is None or after is None:
            assert before is after  # nobody tells, ever
        else:
            assert after - before >= _LARGE

    # Staging

    @pytest.mark.parametrize("nbytes", _SIZES)
    def test_staging_is_writable_and_closes_once(self, device: Device, nbytes: int) -> None:
        staging, content = device.staging(nbytes), _content(nbytes)
        assert (staging.nbytes, staging.view.nbytes, staging.view.readonly) == (nbytes, nbytes, False)
        staging.view[:] = content
        assert staging.view == content
        staging.discard(nbytes // 2, nbytes - nbytes // 2)
        assert staging.view[: nbytes // 2] == content[: nbytes // 2]
        staging.close()
        staging.close()

    def test_staging_pages_stay_for_whoever_holds_a_view(self, device: Device) -> None:
        staging = device.staging(2 * _PAGE)
        part = staging.view[_PAGE:]
        staging.close()
        part[:] = bytes(_PAGE)
        assert part == bytes(_PAGE)

    # Copies

    @pytest.mark.parametrize("nbytes", _SIZES)
    def test_bytes_arrive(self, rig: Rig, nbytes: int) -> None:
        content, memory = _content(nbytes), rig.allocate(nbytes)
        rig.stream.upload(memory, 0, rig.stage(content), 0, nbytes)
        rig.stream.record().synchronize()
        assert rig.read(memory) == content

    @pytest.mark.parametrize("nbytes", _SIZES)
    @pytest.mark.parametrize(("target_offset", "staging_offset"), [(1, 0), (0, 1), (513, 3), (_PAGE, _PAGE)])
    def test_a_part_goes_into_a_part(self, rig: Rig, nbytes: int, target_offset: int, staging_offset: int) -> None:
        content = _content(staging_offset + nbytes + 7)
        memory = rig.allocate(target_offset + nbytes + 5)
        rig.stream.upload(memory, 0, rig.stage(bytes([_GUARD]) * memory.nbytes), 0, memory.nbytes)
        rig.stream.upload(memory, target_offset, rig.stage(content), staging_offset, nbytes)
        rig.stream.record().synchronize()
        found = rig.read(memory)
        assert found[target_offset : target_offset + nbytes] == content[staging_offset : staging_offset + nbytes]
        assert set(found[:target_offset]) | set(found[target_offset + nbytes :]) == {_GUARD}
        part = bytearray(5)
        rig.device.download(memory, memory.nbytes - 5, memoryview(part))
        assert part == bytes([_GUARD]) * 5

    @pytest.mark.parametrize(
        ("target_offset", "staging_offset", "nbytes"),
        [(0, 0, 33), (1, 0, 32), (0, 33, 32), (-1, 0, 8), (0, -1, 8), (0, 0, -1), (32, 0, 1), (1 << 63, 0, 1)],
    )
    def test_ranges_are_checked_before_anything_moves(
        self, rig: Rig, target_offset: int, staging_offset: int, nbytes: int
    ) -> None:
        memory, content = rig.allocate(32), _content(64)
        rig.stream.upload(memory, 0, rig.stage(bytes([_GUARD]) * 32), 0, 32)
        with pytest.raises(RangeError) as caught:
            rig.stream.upload(memory, target_offset, rig.stage(content), staging_offset, nbytes)
        assert caught.value.nbytes == nbytes
        assert caught.value.offset in {target_offset, staging_offset}
        assert caught.value.limit in {32, 64}
        rig.stream.record().synchronize()
        assert rig.read(memory) == bytes([_GUARD]) * 32

    @pytest.mark.parametrize(("offset", "nbytes"), [(-1, 4), (0, 33), (30, 3), (33, 0)])
    def test_downloads_stay_inside(self, rig: Rig, offset: int, nbytes: int) -> None:
        buffer = bytearray(nbytes)
        with pytest.raises(RangeError):
            rig.device.download(rig.allocate(32), offset, memoryview(buffer))

    def test_copies_of_a_stream_are_in_order(self, rig: Rig) -> None:
        nbytes = 256 << 10
        contents = [_content(nbytes, seed) for seed in range(2)]
        stages, memory = [rig.stage(content) for content in contents], rig.allocate(nbytes)
        for turn in range(50):
            rig.stream.upload(memory, 0, stages[turn % 2], 0, nbytes)
        rig.stream.record().synchronize()
        assert rig.read(memory) == contents[1]

    def test_many_small_copies_share_a_buffer(self, rig: Rig) -> None:
        content = _content(109 * 640)
        staging, made = rig.stage(content), [rig.allocate(640) for _ in range(109)]
        for number, memory in enumerate(made):
            rig.stream.upload(memory, 0, staging, number * 640, 640)
        rig.stream.record().synchronize()
        assert b"".join(rig.read(memory) for memory in made) == content

    def test_a_buffer_is_filled_again_once_its_event_has_passed(self, rig: Rig) -> None:
        size, count = 128 << 10, 32
        content, memory, staging = _content(size * count), rig.allocate(size * count), rig.stage(bytes(2 * size))
        events = [rig.stream.record(), rig.stream.record()]
        for number in range(count):
            half = number % 2
            events[half].synchronize()
            staging.view[half * size : (half + 1) * size] = content[number * size : (number + 1) * size]
            rig.stream.upload(memory, number * size, staging, half * size, size)
            events[half] = rig.stream.record()
        rig.stream.close()
        assert rig.read(memory) == content

    # Streams and events

    def test_an_idle_streams_event_passes(self, rig: Rig) -> None:
        event = rig.stream.record()
        event.synchronize()
        event.synchronize()
        assert event.done()

    def test_an_event_passes_when_the_work_before_it_has_ended(self, rig: Rig) -> None:
        content, memory = _content(_PAGE), rig.allocate(_PAGE)
        staging = rig.stage(content)
        passed_before_release: list[bool] = []
        released = threading.Event()
        early = rig.stream.record()
        with self.hold(rig.device, rig.stream) as release:
            rig.stream.upload(memory, 0, staging, 0, _PAGE)
            event = rig.stream.record()

            def wait() -> None:
                rig.device.attach()
                event.synchronize()
                passed_before_release.append(not released.is_set())

            waiter = threading.Thread(target=wait)
            waiter.start()
            early.synchronize()
            assert early.done()
            assert not event.done()
            released.set()
            release()
            waiter.join(_TIMEOUT)
            assert passed_before_release == [False]
            assert event.done()
        assert rig.read(memory) == content

    def test_streams_do_not_wait_for_each_other(self, rig: Rig) -> None:
        content, memory, other = _content(_PAGE), rig.allocate(_PAGE), rig.device.stream()
        staging = rig.stage(content)
        with self.hold(rig.device, rig.stream):
            late = rig.stream.record()
            other.upload(memory, 0, staging, 0, _PAGE)
            other.record().synchronize()
            assert not late.done()
        other.close()
        assert rig.read(memory) == content

    def test_a_barrier_waits_for_every_stream(self, rig: Rig) -> None:
        other = rig.device.stream()
        with self.hold(rig.device, rig.stream) as release:
            barrier = rig.device.barrier()
            other.record().synchronize()
            assert not barrier.done()
            release()
            barrier.synchronize()
            assert barrier.done()
            rig.stream.record().synchronize()
        other.close()

    def test_a_barrier_waits_for_other_libraries(self, rig: Rig) -> None:
        with self.hold(rig.device, None) as release:
            barrier = rig.device.barrier()
            rig.stream.record().synchronize()
            assert not barrier.done()
            release()
            barrier.synchronize()
            assert barrier.done()

    def test_a_barrier_does_not_wait_for_what_comes_after_it(self, rig: Rig) -> None:
        barrier = rig.device.barrier()
        with self.hold(rig.device, None), self.hold(rig.device, rig.stream):
            barrier.synchronize()
            assert barrier.done()

    def test_a_stream_waits_for_an_event_of_another(self, rig: Rig) -> None:
        contents, memory, other = [_content(_PAGE, seed) for seed in range(2)], rig.allocate(_PAGE), rig.device.stream()
        first, second = (rig.stage(content) for content in contents)
        with self.hold(rig.device, rig.stream):
            rig.stream.upload(memory, 0, first, 0, _PAGE)
            other.wait(rig.stream.record())
            other.upload(memory, 0, second, 0, _PAGE)
            event = other.record()
            assert not event.done()
        event.synchronize()
        assert rig.read(memory) == contents[1]
        other.close()

    def test_an_event_that_has_passed_holds_nobody(self, rig: Rig) -> None:
        other, event = rig.device.stream(), rig.stream.record()
        event.synchronize()
        with self.hold(rig.device, rig.stream):
            other.wait(event)
            other.record().synchronize()
        other.close()

    def test_events_tell_the_time_between_them(self, rig: Rig) -> None:
        begin = rig.stream.record(timing=True)
        with self.hold(rig.device, rig.stream) as release:
            end = rig.stream.record(timing=True)
            release()
        end.synchronize()
        assert end.seconds_since(begin) > 0
        assert begin.seconds_since(end) == -end.seconds_since(begin)

    def test_events_that_have_not_passed_have_no_time(self, rig: Rig) -> None:
        begin = rig.stream.record(timing=True)
        begin.synchronize()
        with self.hold(rig.device, rig.stream):
            end = rig.stream.record(timing=True)
            with pytest.raises(DeviceError):
                end.seconds_since(begin)

    def test_its_own_streams_are_adopted_as_they_are(self, rig: Rig) -> None:
        adopted: object = rig.device.adopt(rig.stream)
        assert adopted is rig.stream

    @pytest.mark.parametrize("stream", [object(), "stream", None])
    def test_what_is_no_stream_is_not_adopted(self, rig: Rig, stream: object) -> None:
        with pytest.raises(DeviceError):
            rig.device.adopt(stream)

    def test_closing_a_stream_waits_for_its_work(self, rig: Rig) -> None:
        nbytes = 8 << 20
        content, memory = _content(nbytes), rig.allocate(nbytes)
        staging = rig.stage(content)
        rig.stream.upload(memory, 0, staging, 0, nbytes)
        rig.stream.close()
        rig.stream.close()
        assert rig.read(memory) == content
        with pytest.raises(DeviceError):
            rig.stream.upload(memory, 0, staging, 0, nbytes)
        with pytest.raises(DeviceError):
            rig.stream.record()

    def test_threads_use_it_together(self, device: Device) -> None:
        found: dict[int, bool] = {}
        start = threading.Barrier(_THREADS)

        def work(number: int) -> None:
            device.attach()
            device.attach()
            content = _content((1 << 20) + number, number)
            start.wait(_TIMEOUT)
            stream, staging, memory = device.stream(), device.staging(len(content)), device.allocate(len(content))
            staging.view[:] = content
            for offset in range(0, len(content), 64 << 10):
                stream.upload(memory, offset, staging, offset, min(64 << 10, len(content) - offset))
            stream.record().synchronize()
            found[number] = _read(device, memory) == content
            stream.close()
            staging.close()
            device.free(memory)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_TIMEOUT)
        assert found == dict.fromkeys(range(_THREADS), True)
