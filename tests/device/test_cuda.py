"""CUDA devices: the contract, and what only a real driver can show."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest

from asyncload.device import Device, DeviceMemory, Residency, Stream, default_device, open_device
from asyncload.device._cuda import CudaDevice, CudaStream, cuda_device_count
from asyncload.errors import BackendUnavailableError, DeviceNotFoundError
from asyncload.testing import DeviceConformance, SleepingKernel

TIMEOUT = 60.0


@pytest.fixture(scope="session")
def kernel() -> Iterator[SleepingKernel]:
    kernel = SleepingKernel()
    yield kernel
    kernel.close()


@pytest.fixture
def cuda() -> Iterator[CudaDevice]:
    device = CudaDevice()
    yield device
    device.close()


@pytest.mark.gpu
class TestCudaDevice(DeviceConformance):
    @pytest.fixture
    def device(self, cuda: CudaDevice, kernel: SleepingKernel) -> CudaDevice:
        self.kernel = kernel
        return cuda

    @contextmanager
    def hold(self, device: Device, stream: Stream | None) -> Generator[Callable[[], None]]:
        assert isinstance(device, CudaDevice)
        assert stream is None or isinstance(stream, CudaStream)
        with self.kernel.asleep(self.kernel.stream() if stream is None else stream) as sleep:
            yield sleep.wake


@pytest.mark.gpu
@pytest.mark.native
def test_cpp_frees_what_was_allocated_and_says_what_was_not(cuda: CudaDevice) -> None:
    cuda.native()
    TestCudaDevice().test_several_are_freed_at_once_but_for_what_was_not_allocated(cuda)


# Without a GPU

NO_DEVICE = """
from asyncload.device import default_device, open_device
from asyncload.device._cuda import cuda_device_count
from asyncload.errors import BackendUnavailableError, DeviceNotFoundError
assert cuda_device_count() == 0
assert default_device() == "host"
try:
    open_device("cuda")
except (BackendUnavailableError, DeviceNotFoundError) as error:
    print(type(error).__name__, error.device)
"""


def run(script: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
        env={**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path)), **environment},
    ).stdout.strip()


def test_no_device_is_visible() -> None:
    assert run(NO_DEVICE, CUDA_VISIBLE_DEVICES="") in {"DeviceNotFoundError cuda:0", "BackendUnavailableError cuda"}


def test_the_packages_are_missing() -> None:
    hide = "import sys; sys.modules['cuda'] = None\n"
    assert run(hide + NO_DEVICE) == "BackendUnavailableError cuda"


def test_there_is_no_driver() -> None:
    if cuda_device_count() > 0 or not find_spec("cuda"):
        pytest.skip("shown only where the packages are installed and the driver is not")
    with pytest.raises(BackendUnavailableError) as caught:
        CudaDevice()
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert default_device() == "host"


def test_the_kernel_of_the_gpu_tests_compiles() -> None:
    for architecture in ("sm_80", "sm_90"):
        assert len(SleepingKernel.compile(architecture).code) > 0


# With one


@pytest.mark.gpu
def test_devices_are_found_by_name() -> None:
    count = cuda_device_count()
    assert count > 0
    assert default_device() == "cuda:0"
    for number, name in enumerate(["cuda", *(f"cuda:{number}" for number in range(1, count))]):
        device = open_device(name)
        assert device.info.name == f"cuda:{number}"
        assert (device.info.kind, device.info.index) == ("cuda", number)
        assert device.info.model
        device.close()
    with pytest.raises(DeviceNotFoundError) as caught:
        open_device(f"cuda:{count}")
    assert caught.value.device == f"cuda:{count}"


@pytest.mark.gpu
def test_freed_memory_is_the_drivers_again(cuda: CudaDevice) -> None:
    before = cuda.memory().free
    made = [cuda.allocate(27 << 20) for _ in range(40)]
    assert before - cuda.memory().free >= 40 * (27 << 20)
    for memory in made:
        cuda.free(memory)
    assert cuda.memory().free == before


def lies_in(cuda: CudaDevice, address: int, kind: str) -> bool:
    """Whether the driver knows the address as memory of a kind, such as ``"HOST"`` (registered) or ``"DEVICE"``."""
    driver: Any = cuda.driver
    code, value = driver.cuPointerGetAttribute(driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address)
    return int(code) == 0 and int(value) == int(getattr(driver.CUmemorytype, f"CU_MEMORYTYPE_{kind}"))


@pytest.mark.gpu
def test_staging_memory_is_registered_and_given_back(cuda: CudaDevice) -> None:
    staging = cuda.staging((8 << 20) + 4096)
    pages = [staging.address + offset for offset in (0, 4 << 20, 8 << 20)]
    assert all(lies_in(cuda, page, "HOST") for page in pages)
    view = staging.view[:]  # keeps the pages mapped
    staging.close()
    assert not any(lies_in(cuda, page, "HOST") for page in pages)
    assert view[0] == 0


@pytest.mark.gpu
def test_allocated_memory_is_device_memory(cuda: CudaDevice) -> None:
    memory = cuda.allocate(4096)
    assert lies_in(cuda, memory.address, "DEVICE")
    cuda.free(memory)


@pytest.mark.gpu
def test_staging_memory_is_the_hosts_until_it_is_closed(cuda: CudaDevice) -> None:
    staging = cuda.staging(4096)
    memory, view = DeviceMemory(staging.address, 4096), staging.view[:]  # keeps the pages mapped
    assert cuda.residency(memory) is Residency.HOST
    staging.close()
    assert cuda.residency(memory) not in {Residency.DEVICE, Residency.HOST}
    assert view[0] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("attachment", ["GLOBAL", "HOST"])
def test_managed_memory_is_not_the_devices(cuda: CudaDevice, attachment: str) -> None:
    driver: Any = cuda.driver
    flags = int(getattr(driver.CUmemAttach_flags, f"CU_MEM_ATTACH_{attachment}"))
    address = int(cuda.check("managed memory", driver.cuMemAllocManaged(4096, flags)))
    assert cuda.residency(DeviceMemory(address, 4096)) is Residency.MANAGED
    cuda.check("freeing", driver.cuMemFree(address))


@pytest.mark.gpu
def test_memory_that_another_library_took_of_the_device_is_resident(cuda: CudaDevice) -> None:
    driver: Any = cuda.driver
    address = int(cuda.check("memory past the device", driver.cuMemAlloc(1 << 20)))
    assert cuda.residency(DeviceMemory(address + 4096, 4096)) is Residency.DEVICE
    stream = cuda.stream()
    pooled = int(cuda.check("memory of a pool", driver.cuMemAllocAsync(1 << 20, stream.handle)))
    assert cuda.residency(DeviceMemory(pooled, 1 << 20)) is Residency.DEVICE
    cuda.check("freeing", driver.cuMemFreeAsync(pooled, stream.handle))
    stream.close()
    cuda.check("freeing", driver.cuMemFree(address))


@pytest.mark.gpu
def test_every_other_devices_memory_is_elsewhere(cuda: CudaDevice) -> None:
    for number in range(1, cuda_device_count()):
        other = CudaDevice(number)
        memory = other.allocate(4096)
        cuda.attach()
        assert cuda.residency(memory) is Residency.ELSEWHERE
        assert other.residency(memory) is Residency.DEVICE
        other.free(memory)
        other.close()
    cuda.attach()


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["event", "barrier", "close", "download"])
def test_waiting_threads_sleep(cuda: CudaDevice, kernel: SleepingKernel, what: str) -> None:
    stream = cuda.stream()
    memory, buffer = cuda.allocate(4096), memoryview(bytearray(4096))
    with kernel.asleep(stream, seconds=0.2):
        wall, processor = time.perf_counter(), time.thread_time()
        match what:
            case "event":
                stream.record().synchronize()
            case "barrier":
                cuda.barrier().synchronize()
            case "close":
                stream.close()
            case _:
                stream.record().synchronize()
                cuda.download(memory, 0, buffer)
        processor, wall = time.thread_time() - processor, time.perf_counter() - wall
    stream.close()
    cuda.free(memory)
    assert processor < 0.5 * wall


@pytest.mark.gpu
def test_waiting_frees_the_interpreter_lock(cuda: CudaDevice, kernel: SleepingKernel) -> None:
    """Only another thread can wake the kernel, so a waiter that kept the lock would never come back."""
    stream = cuda.stream()
    passed = threading.Event()
    with kernel.asleep(stream) as sleep:
        waiting = threading.Event()

        def wait() -> None:
            cuda.attach()
            waiting.set()
            stream.record().synchronize()
            passed.set()

        waiter = threading.Thread(target=wait)
        waiter.start()
        assert waiting.wait(TIMEOUT)
        assert not passed.is_set()
        sleep.wake()
        assert passed.wait(TIMEOUT)
        waiter.join(TIMEOUT)
    stream.close()


@pytest.mark.gpu
def test_a_copy_is_enqueued_and_not_waited_for(cuda: CudaDevice, kernel: SleepingKernel) -> None:
    nbytes = 64 << 20
    staging, memory, stream = cuda.staging(nbytes), cuda.allocate(nbytes), cuda.stream()
    staging.view[-4:] = b"done"
    with kernel.asleep(stream) as sleep:
        for offset in range(0, nbytes, 4 << 20):
            stream.upload(memory, offset, staging, offset, 4 << 20)
        event = stream.record()
        assert not event.done()
        sleep.wake()
        event.synchronize()
    tail = bytearray(4)
    cuda.download(memory, nbytes - 4, memoryview(tail))
    assert tail == b"done"
    stream.close()
    staging.close()
    cuda.free(memory)


@pytest.mark.gpu
def test_a_barrier_waits_for_the_default_streams(cuda: CudaDevice, kernel: SleepingKernel) -> None:
    core: Any = import_module("cuda.core")
    for default in (core.LEGACY_DEFAULT_STREAM, core.PER_THREAD_DEFAULT_STREAM):
        with kernel.asleep(default) as sleep:
            barrier = cuda.barrier()
            assert not barrier.done()
            sleep.wake()
            barrier.synchronize()


@pytest.mark.gpu
def test_a_thread_that_never_attached_allocates_and_reads(cuda: CudaDevice) -> None:
    found: list[bytes] = []

    def work() -> None:
        staging, memory = cuda.staging(4096), cuda.allocate(4096)
        stream = cuda.stream()
        staging.view[:] = b"a" * 4096
        stream.upload(memory, 0, staging, 0, 4096)
        cuda.barrier().synchronize()
        buffer = bytearray(memory.nbytes)
        cuda.download(memory, 0, memoryview(buffer))
        found.append(bytes(buffer))
        stream.close()
        staging.close()
        cuda.free(memory)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(TIMEOUT)
    assert found == [b"a" * 4096]


BAD_COPY = """
from asyncload.device import DeviceMemory, open_device
from asyncload.errors import DeviceError
device = open_device("cuda:0")
staging, stream = device.staging(4096), device.stream()
try:
    stream.upload(DeviceMemory(256, 4096), 0, staging, 0, 4096)
    stream.record().synchronize()
except DeviceError as error:
    print(type(error).__name__, error.device, error.code)
"""


@pytest.mark.gpu
def test_a_refused_copy_carries_the_drivers_code() -> None:
    """In a process of its own, as a context may be unusable after it."""
    kind, device, code = run(BAD_COPY).split()
    assert (kind, device) == ("CopyError", "cuda:0")
    assert code.startswith("CUDA_ERROR_")
