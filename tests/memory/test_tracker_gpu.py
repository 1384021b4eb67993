"""The ledger over a real driver: memory that a kernel still reads stays, and all of it comes back."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from random import Random

import pytest

from asyncload.device import Device, DeviceMemory, open_device
from asyncload.device._cuda import CudaDevice
from asyncload.errors import OutOfDeviceMemoryError, ResidencyError
from asyncload.memory import Allocation, Purpose, VramTracker
from asyncload.plan import ALLOCATION_BLOCK
from asyncload.testing import SleepingKernel

pytestmark = pytest.mark.gpu

TIMEOUT = 60.0
NBYTES = 32 << 20


@pytest.fixture(scope="module")
def kernel() -> Iterator[SleepingKernel]:
    kernel = SleepingKernel()
    yield kernel
    kernel.close()


@pytest.fixture
def device() -> Iterator[Device]:
    device = open_device("cuda:0")
    yield device
    device.close()


@pytest.fixture
def tracker(device: Device) -> Iterator[VramTracker]:
    tracker = VramTracker(device)
    tracker.allocate(NBYTES, Purpose.UNKNOWN, "what the driver takes for itself on the way").close()
    tracker.flush()
    yield tracker
    tracker.close()


def fill(device: Device, memory: DeviceMemory, content: bytes) -> None:
    staging, stream = device.staging(len(content)), device.stream()
    staging.view[:] = content
    stream.upload(memory, 0, staging, 0, len(content))
    stream.close()
    staging.close()


def read(device: Device, memory: DeviceMemory) -> bytes:
    content = bytearray(memory.nbytes)
    device.download(memory, 0, memoryview(content))
    return bytes(content)


@pytest.mark.parametrize("by", ["the last reference", "close", "the last reference on another thread"])
def test_memory_stays_until_the_kernel_that_reads_it_has_ended(
    device: Device, tracker: VramTracker, kernel: SleepingKernel, by: str
) -> None:
    content = Random(1).randbytes(NBYTES)
    result = tracker.allocate(NBYTES, Purpose.SCRATCH, "the kernel's result")
    free_before = device.memory().free
    held: list[Allocation] = [tracker.allocate(NBYTES, Purpose.WEIGHTS, "what the kernel reads")]
    address = held[0].address
    fill(device, held[0].memory, content)
    foreign = kernel.stream()
    with kernel.asleep(foreign, source=address, target=result.address, nbytes=NBYTES) as sleep:
        ended = foreign.record()
        if by == "close":
            held[0].close()
        if by.endswith("thread"):
            thread = threading.Thread(target=held.clear)
            thread.start()
            thread.join(TIMEOUT)
        held.clear()
        assert not ended.is_done  # so dropping has not waited
        flushed = threading.Event()

        def flush() -> None:
            tracker.flush()
            flushed.set()

        flusher = threading.Thread(target=flush)
        flusher.start()
        assert tracker.by_purpose() == {"scratch": NBYTES, "weights": NBYTES}
        assert not flushed.is_set()
        assert not ended.is_done  # nor has anything else woken it
        sleep.wake()
        assert flushed.wait(TIMEOUT)
        assert ended.is_done
        flusher.join(TIMEOUT)
    assert read(device, result.memory) == content
    assert tracker.by_purpose() == {"scratch": NBYTES}
    assert abs(device.memory().free - free_before) < NBYTES // 2  # a stream takes some too


def test_the_reclaim_thread_sleeps_while_it_waits(device: Device, tracker: VramTracker, kernel: SleepingKernel) -> None:
    allocation = tracker.allocate(NBYTES, Purpose.WEIGHTS, "a tensor")
    with kernel.asleep(kernel.stream(), seconds=0.3):
        processor, wall = time.process_time(), time.perf_counter()
        allocation.close()
        tracker.flush()
        processor, wall = time.process_time() - processor, time.perf_counter() - wall
    assert processor < 0.5 * wall


def test_the_ledger_agrees_with_the_driver(device: Device, tracker: VramTracker) -> None:
    before, granularity = device.memory().free, 2 << 20
    held = [tracker.allocate(27 << 20, Purpose.WEIGHTS, f"blk.{number}") for number in range(40)]
    taken = before - device.memory().free
    assert tracker.total <= taken <= tracker.total + 40 * granularity
    held.clear()
    tracker.flush()
    assert (tracker.total, device.memory().free) == (0, before)


def test_out_of_memory_carries_the_breakdown(device: Device, tracker: VramTracker) -> None:
    kept = tracker.allocate(NBYTES, Purpose.KV_CACHE, "kept")
    with pytest.raises(OutOfDeviceMemoryError) as caught:
        tracker.allocate(device.info.total_bytes, Purpose.WEIGHTS, "everything")
    assert caught.value.breakdown == {"kv_cache": kept.nbytes}
    assert caught.value.code == "CUDA_ERROR_OUT_OF_MEMORY"
    assert caught.value.available is not None
    assert caught.value.available < caught.value.needed == device.info.total_bytes


def test_the_ledger_is_within_what_the_driver_says(device: Device, tracker: VramTracker) -> None:
    assert tracker.reconcile().within
    held = [tracker.allocate(27 << 20, Purpose.WEIGHTS, f"blk.{number}") for number in range(40)]
    held += [tracker.allocate(640, Purpose.WEIGHTS, f"norm.{number}") for number in range(40)]
    stream, staging = device.stream(), device.staging(256 << 20)  # what a context grows by
    found = tracker.reconcile()
    assert found.ledger_change == tracker.total
    assert found.within, found
    stream.close()
    staging.close()
    held.clear()
    tracker.flush()
    found = tracker.reconcile()
    assert found.ledger_change == 0
    assert found.within, found


def test_what_went_past_the_ledger_shows_until_it_is_registered(device: Device, tracker: VramTracker) -> None:
    """A device object of its own stands for another library."""
    library = open_device("cuda:0")
    cache = library.allocate(512 << 20)
    found = tracker.reconcile()
    assert not found.within, found
    assert abs(found.difference - cache.nbytes) <= found.tolerance
    with tracker.register(cache.address, cache.nbytes, Purpose.KV_CACHE, "the cache"):
        assert tracker.reconcile().within
        tracker.verify_residency()
    library.free(cache)
    assert tracker.reconcile().within


def test_what_is_not_in_the_devices_memory_is_named(device: Device, tracker: VramTracker) -> None:
    assert isinstance(device, CudaDevice)
    held = [tracker.allocate(nbytes, Purpose.WEIGHTS, f"{nbytes} bytes") for nbytes in (1, 640, 27 << 20)]
    tracker.verify_residency()
    staging = device.staging(4096)
    flags = int(device.driver.CUmemAttach_flags.CU_MEM_ATTACH_GLOBAL)
    managed = int(device.check("managed memory", device.driver.cuMemAllocManaged(4096, flags)))
    with (
        tracker.register(staging.address, 4096, Purpose.KV_CACHE, "pinned"),
        tracker.register(managed, 4096, Purpose.KV_CACHE, "managed"),
        pytest.raises(ResidencyError) as caught,
    ):
        tracker.verify_residency()
    assert set(caught.value.allocations) == {"pinned", "managed"}
    tracker.verify_residency()
    device.check("freeing", device.driver.cuMemFree(managed))
    staging.close()
    assert len(held) == 3


def test_large_allocations_take_the_blocks_that_plans_count(device: Device) -> None:
    sizes = [3 << 20, (4 << 20) + 1, 5 << 20] * 4
    before = device.memory().free
    made = device.allocate_all(sizes)
    assert before - device.memory().free == 4 * (2 + 3 + 3) * ALLOCATION_BLOCK
    assert device.free_all(made) == {}
    assert device.memory().free == before
