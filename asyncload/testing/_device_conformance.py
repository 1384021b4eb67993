"""What every device does, as tests: a backend's test class inherits from ``DeviceConformance``."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from random import Random

import pytest

from asyncload.device import Device, DeviceMemory, StagingMemory, Stream
from asyncload.errors import DeviceError, OutOfDeviceMemoryError, RangeError

__all__ = ["DeviceConformance"]

_PAGE = 4096
_SIZES = (0, 1, _PAGE - 1, _PAGE, _PAGE + 1, (3 << 20) + 1)
_GUARD = 0xEE
_TIMEOUT = 60.0  # seconds; generous, as it only matters where something hangs
_THREADS = 8


def _content(nbytes: int, seed: int = 0) -> bytes:
    return Random(seed).randbytes(nbytes)  # noqa: S311 - data, not secrets


class DeviceConformance(ABC):
    """The contract of ``asyncload.device.Device`` as tests.

    A subclass supplies the fixture ``device``, an open device that it closes afterwards, and ``hold``.
    """

    @abstractmethod
    def hold(self, device: Device, stream: Stream | None) -> AbstractContextManager[Callable[[], None]]:
        """Enqueues work on a stream that ends when the function is called that the block gets, or when the block ends.

        Without a stream it is the work of somebody else, which the device's own streams know nothing of.
        """

    @pytest.fixture
    def stream(self, device: Device) -> Iterator[Stream]:
        """A stream of the device."""
        stream = device.stream()
        yield stream
        stream.close()

    @pytest.fixture
    def stage(self, device: Device) -> Iterator[Callable[[bytes], StagingMemory]]:
        """Makes staging memory with given content."""
        made: list[StagingMemory] = []

        def stage(content: bytes) -> StagingMemory:
            staging = device.staging(len(content))
            made.append(staging)
            staging.view[:] = content
            return staging

        yield stage
        device.barrier().synchronize()
        for staging in made:
            staging.close()

    @pytest.fixture
    def allocate(self, device: Device) -> Iterator[Callable[[int], DeviceMemory]]:
        """Allocates device memory that is freed after the test."""
        made: list[DeviceMemory] = []

        def allocate(nbytes: int) -> DeviceMemory:
            made.append(device.allocate(nbytes))
            return made[-1]

        yield allocate
        device.barrier().synchronize()
        for memory in made:
            device.free(memory)

    def read(self, device: Device, memory: DeviceMemory) -> bytes:
        """All bytes of device memory."""
        content = bytearray(memory.nbytes)
        device.download(memory, 0, memoryview(content))
        return bytes(content)

    # Memory

    def test_info(self, device: Device) -> None:
        info, memory = device.info, device.memory()
        assert info.name in {info.kind, f"{info.kind}:{info.index}"}
        assert info.model
        assert 0 < memory.free <= memory.total == info.total_bytes

    @pytest.mark.parametrize("nbytes", [1, 255, 256, 257, _PAGE + 1])
    def test_memory_is_aligned_and_apart(self, allocate: Callable[[int], DeviceMemory], nbytes: int) -> None:
        made = [allocate(nbytes) for _ in range(5)]
        assert all(memory.nbytes == nbytes and memory.address > 0 and memory.address % 256 == 0 for memory in made)
        starts = sorted(memory.address for memory in made)
        assert all(after - before >= nbytes for before, after in zip(starts, starts[1:], strict=False))

    def test_empty_memory_has_no_address(self, device: Device) -> None:
        memory = device.allocate(0)
        assert memory == DeviceMemory(0, 0)
        device.free(memory)
        device.free(memory)

    def test_freed_memory_is_the_devices_again(self, device: Device) -> None:
        before, nbytes = device.memory().free, 64 << 20
        memory = device.allocate(nbytes)
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

    def test_too_much_memory_is_refused_and_nothing_breaks(self, device: Device) -> None:
        with pytest.raises(OutOfDeviceMemoryError) as caught:
            device.allocate(1 << 60)
        assert isinstance(caught.value, MemoryError)
        assert caught.value.needed == 1 << 60
        assert caught.value.available is not None
        assert 0 < caught.value.available <= device.info.total_bytes
        assert (caught.value.breakdown, caught.value.device) == ({}, device.info.name)
        device.free(device.allocate(_PAGE))

    def test_memory_outlives_the_device_object(
        self, device: Device, stage: Callable[[bytes], StagingMemory], stream: Stream
    ) -> None:
        memory, content = device.allocate(_PAGE), _content(_PAGE)
        stream.upload(memory, 0, stage(content), 0, _PAGE)
        stream.close()
        device.close()
        assert self.read(device, memory) == content
        device.barrier().synchronize()
        device.free(memory)
        device.close()

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
    def test_bytes_arrive(
        self,
        device: Device,
        stream: Stream,
        stage: Callable[[bytes], StagingMemory],
        allocate: Callable[[int], DeviceMemory],
        nbytes: int,
    ) -> None:
        content, memory = _content(nbytes), allocate(nbytes)
        stream.upload(memory, 0, stage(content), 0, nbytes)
        stream.record().synchronize()
        assert self.read(device, memory) == content

    @pytest.mark.parametrize("nbytes", _SIZES)
    @pytest.mark.parametrize(("target_offset", "staging_offset"), [(1, 0), (0, 1), (513, 3), (_PAGE, _PAGE)])
    def test_a_part_goes_into_a_part(
        self,
        device: Device,
        stream: Stream,
        stage: Callable[[bytes], StagingMemory],
        allocate: Callable[[int], DeviceMemory],
        nbytes: int,
        target_offset: int,
        staging_offset: int,
    ) -> None:
        content = _content(staging_offset + nbytes + 7)
        memory = allocate(target_offset + nbytes + 5)
        stream.upload(memory, 0, stage(bytes([_GUARD]) * memory.nbytes), 0, memory.nbytes)
        stream.upload(memory, target_offset, stage(content), staging_offset, nbytes)
        stream.record().synchronize()
        found = self.read(device, memory)
        assert found[target_offset : target_offset + nbytes] == content[staging_offset : staging_offset + nbytes]
        assert set(found[:target_offset]) | set(found[target_offset + nbytes :]) == {_GUARD}
        part = bytearray(5)
        device.download(memory, memory.nbytes - 5, memoryview(part))
        assert part == bytes([_GUARD]) * 5

    @pytest.mark.parametrize(
        ("target_offset", "staging_offset", "nbytes"),
        [(0, 0, 33), (1, 0, 32), (0, 33, 32), (-1, 0, 8), (0, -1, 8), (0, 0, -1), (32, 0, 1), (1 << 63, 0, 1)],
    )
    def test_ranges_are_checked_before_anything_moves(
        self,
        device: Device,
        stream: Stream,
        stage: Callable[[bytes], StagingMemory],
        allocate: Callable[[int], DeviceMemory],
        target_offset: int,
        staging_offset: int,
        nbytes: int,
    ) -> None:
        memory, content = allocate(32), _content(64)
        stream.upload(memory, 0, stage(bytes([_GUARD]) * 32), 0, 32)
        with pytest.raises(RangeError) as caught:
            stream.upload(memory, target_offset, stage(content), staging_offset, nbytes)
        assert caught.value.nbytes == nbytes
        assert caught.value.offset in {target_offset, staging_offset}
        assert caught.value.limit in {32, 64}
        stream.record().synchronize()
        assert self.read(device, memory) == bytes([_GUARD]) * 32

    @pytest.mark.parametrize(("offset", "nbytes"), [(-1, 4), (0, 33), (30, 3), (33, 0)])
    def test_downloads_stay_inside(
        self, device: Device, allocate: Callable[[int], DeviceMemory], offset: int, nbytes: int
    ) -> None:
        buffer = bytearray(nbytes)
        with pytest.raises(RangeError):
            device.download(allocate(32), offset, memoryview(buffer))

    def test_copies_of_a_stream_are_in_order(
        self,
        device: Device,
        stream: Stream,
        stage: Callable[[bytes], StagingMemory],
        allocate: Callable[[int], DeviceMemory],
    ) -> None:
        nbytes = 256 << 10
        contents = [_content(nbytes, seed) for seed in range(2)]
        stages, memory = [stage(content) for content in contents], allocate(nbytes)
        for turn in range(50):
            stream.upload(memory, 0, stages[turn % 2], 0, nbytes)
        stream.record().synchronize()
        assert self.read(device, memory) == contents[1]

    def test_many_small_copies_share_a_buffer(
        self,
        device: Device,
        stream: Stream,
        stage: Callable[[bytes], StagingMemory],
        allocate: Callable[[int], DeviceMemory],
    ) -> None:
        content = _content(109 * 640)
        staging, made = stage(content), [allocate(640) for _ in range(109)]
        for number, memory in enumerate(made):
            stream.upload(memory, 0, staging, number * 640, 640)
        stream.record().synchronize()
        assert b"".join(self.read(device, memory) for memory in made) == content

    def test_a_buffer_is_filled_again_once_its_event_has_passed(
        self,
        device: Device,
        stream: Stream,
        stage: Callable[[bytes], StagingMemory],
        allocate: Callable[[int], DeviceMemory],
    ) -> None:
        size, count = 128 << 10, 32
        content, memory, staging = _content(size * count), allocate(size * count), stage(bytes(2 * size))
        events = [stream.record(), stream.record()]
        for number in range(count):
            half = number % 2
            events[half].synchronize()
            staging.view[half * size : (half + 1) * size] = content[number * size : (number + 1) * size]
            stream.upload(memory, number * size, staging, half * size, size)
            events[half] = stream.record()
        stream.close()
        assert self.read(device, memory) == content

    # Streams and events

    def test_an_idle_streams_event_passes(self, stream: Stream) -> None:
        event = stream.record()
        event.synchronize()
        event.synchronize()
        assert event.done()

    def test_an_event_passes_when_the_work_before_it_has_ended(
        self,
        device: Device,
        stream: Stream,
        stage: Callable[[bytes], StagingMemory],
        allocate: Callable[[int], DeviceMemory],
    ) -> None:
        content, memory = _content(_PAGE), allocate(_PAGE)
        staging = stage(content)
        passed_before_release: list[bool] = []
        released = threading.Event()
        early = stream.record()
        with self.hold(device, stream) as release:
            stream.upload(memory, 0, staging, 0, _PAGE)
            event = stream.record()

            def wait() -> None:
                device.attach()
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
        assert self.read(device, memory) == content

    def test_streams_do_not_wait_for_each_other(
        self,
        device: Device,
        stream: Stream,
        stage: Callable[[bytes], StagingMemory],
        allocate: Callable[[int], DeviceMemory],
    ) -> None:
        content, memory, staging, other = _content(_PAGE), allocate(_PAGE), stage(_content(_PAGE)), device.stream()
        with self.hold(device, stream):
            late = stream.record()
            other.upload(memory, 0, staging, 0, _PAGE)
            other.record().synchronize()
            assert self.read(device, memory) == content
            assert not late.done()
            other.close()

    def test_a_barrier_waits_for_every_stream(self, device: Device, stream: Stream) -> None:
        other = device.stream()
        with self.hold(device, stream) as release:
            barrier = device.barrier()
            other.record().synchronize()
            assert not barrier.done()
            release()
            barrier.synchronize()
            assert barrier.done()
            stream.record().synchronize()
        other.close()

    def test_a_barrier_waits_for_other_libraries(self, device: Device, stream: Stream) -> None:
        with self.hold(device, None) as release:
            barrier = device.barrier()
            stream.record().synchronize()
            assert not barrier.done()
            release()
            barrier.synchronize()
            assert barrier.done()

    def test_a_barrier_does_not_wait_for_what_comes_after_it(self, device: Device, stream: Stream) -> None:
        barrier = device.barrier()
        with self.hold(device, None), self.hold(device, stream):
            barrier.synchronize()
            assert barrier.done()

    def test_closing_a_stream_waits_for_its_work(
        self, device: Device, stage: Callable[[bytes], StagingMemory], allocate: Callable[[int], DeviceMemory]
    ) -> None:
        stream, nbytes = device.stream(), 8 << 20
        content, memory = _content(nbytes), allocate(nbytes)
        staging = stage(content)
        stream.upload(memory, 0, staging, 0, nbytes)
        stream.close()
        stream.close()
        assert self.read(device, memory) == content
        with pytest.raises(DeviceError):
            stream.upload(memory, 0, staging, 0, nbytes)
        with pytest.raises(DeviceError):
            stream.record()

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
            found[number] = self.read(device, memory) == content
            stream.close()
            staging.close()
            device.free(memory)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_TIMEOUT)
        assert found == dict.fromkeys(range(_THREADS), True)
