"""CUDA devices, on ``cuda.core``: its devices, contexts, streams and events.

``cuda.bindings`` stands in for what ``cuda.core`` has not:

- Memory that goes back to the driver when it is freed. ``cuda.core``'s default memory resource is a pool that keeps
  what is freed (8 GB stayed with it in a test on an H200), so that nobody else could use it and the driver's figures
  could not be held against ours. cuMemAlloc takes 13 ms for 300 x 27 MiB there, and cuMemFree gives back at once.
- Copies between parts of buffers: a ``Buffer`` is copied as a whole, and one made for each of a chunk's hundred small
  tensors would cost more than the copy.
- Registering memory, and an event in all work of a context.

Both release the interpreter lock in the driver (``cuda.bindings`` from 12.9.1 on).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from asyncload.device._contract import (
    DeviceInfo,
    DeviceMemory,
    Event,
    MemoryInfo,
    Recipient,
    Residency,
    StagingMemory,
    WorkOnStream,
    WorkStream,
    check_decode,
    check_download,
    check_upload,
)
from asyncload.device._nvml import process_memory
from asyncload.device._pages import Pages
from asyncload.device._several import allocate_each, allocate_until
from asyncload.errors import (
    AsyncloadError,
    BackendUnavailableError,
    CopyError,
    DeviceError,
    DeviceNotFoundError,
    OutOfDeviceMemoryError,
)
from asyncload.gguf import GGMLType
from asyncload.quant import DType, cuda
from asyncload.threads import is_own_thread

__all__ = ["CudaDevice", "CudaEvent", "CudaStaging", "CudaStream", "cuda_device_count"]

# Pages that the driver has registered. They must not be unmapped before they are unregistered, or whatever is mapped at
# that address next is copied from the old physical pages: who forgets to close them leaks them here.
_registered: set[Pages] = set()

_OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"
_PER_THREAD = 2  # CU_STREAM_PER_THREAD, a handle that means another stream on each thread
# What cuCtxRecordEvent (new in CUDA 12.5) answers where there is no such thing.
_NO_CONTEXT_EVENTS = frozenset({"CUDA_ERROR_NOT_SUPPORTED", "CUDA_ERROR_NOT_FOUND", "CUDA_ERROR_STUB_LIBRARY"})


def cuda_device_count() -> int:
    """The number of CUDA devices that this process can use; 0 where packages or driver are missing. Never raises."""
    try:
        return _count(_load("cuda.bindings.driver"))
    except Exception:  # noqa: BLE001 - whatever is broken, it is no device that can be used
        return 0


def _load(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise BackendUnavailableError(
            f"CUDA needs the packages of the extra 'cuda12' or 'cuda13' (pip install 'asyncload[cuda13]'): {error}",
            device="cuda",
        ) from error


def _count(driver: Any) -> int:
    """Starts the driver and counts its devices."""
    try:
        (code,) = driver.cuInit(0)
        if code.name == "CUDA_ERROR_NO_DEVICE":  # also with CUDA_VISIBLE_DEVICES set to nothing
            return 0
        code, count = driver.cuDeviceGetCount() if int(code) == 0 else (code, 0)
    except RuntimeError as error:  # the bindings found no libcuda
        raise BackendUnavailableError(f"there is no CUDA driver: {error}", device="cuda") from error
    if int(code) != 0:
        raise BackendUnavailableError(f"the CUDA driver does not start: {code.name}", device="cuda", code=code.name)
    return int(count)


@contextmanager
def _mapping_errors(device: str, what: str, error: type[DeviceError] = DeviceError) -> Generator[None]:
    """Turns whatever ``cuda.core`` raises into an error of ours."""
    try:
        yield
    except AsyncloadError:
        raise
    except Exception as failure:
        names = getattr(failure, "name", ""), str(failure).partition(":")[0]
        code = next((name for name in names if isinstance(name, str) and name.startswith("CUDA_ERROR_")), None)
        raise error(f"{device}: {what}: {failure}", device=device, code=code) from failure


def _handle(stream: Any) -> int:
    """The address of a stream's handle, in any of the forms in which libraries give it."""
    if isinstance(stream, int):
        return stream
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    return int(stream.cuda_stream if hasattr(stream, "cuda_stream") else stream.ptr)


class CudaEvent:
    """An event that its waiters sleep on."""

    __slots__ = ("_device", "_error", "event", "native")

    def __init__(self, device: CudaDevice, event: Any, error: type[DeviceError]) -> None:
        self._device = device
        self.event: Any = event  #: ``cuda.core``'s
        self._error = error
        self.native: Any = None  #: the same for C++ threads, once one of these has waited for it

    @property
    def handle(self) -> int:
        """The ``CUevent``'s address."""
        return int(self.event.handle)

    def done(self) -> bool:
        """Asks the driver."""
        with _mapping_errors(self._device.info.name, "work on the device failed", self._error):
            return bool(self.event.is_done)

    def synchronize(self) -> None:
        """Sleeps in the driver: the event was made with blocking synchronization."""
        with _mapping_errors(self._device.info.name, "work on the device failed", self._error):
            self.event.sync()

    def seconds_since(self, earlier: Event) -> float:
        """Asks the driver, which counts half microseconds."""
        return self._device.seconds_between(earlier, self)


class NativeCudaEvent:
    """An event that a C++ thread records."""

    __slots__ = ("_device", "native")

    def __init__(self, device: CudaDevice, native: Any) -> None:
        self._device = device
        self.native: Any = native  #: the ``asyncload_native.Event``

    @property
    def handle(self) -> int:
        """The ``CUevent``'s address."""
        return int(self.native.handle)

    def done(self) -> bool:
        """Asks the driver."""
        with _mapping_errors(self._device.info.name, "work on the device failed", CopyError):
            return bool(self.native.done())

    def synchronize(self) -> None:
        """Sleeps in the driver."""
        with _mapping_errors(self._device.info.name, "work on the device failed", CopyError):
            self.native.synchronize()

    def seconds_since(self, earlier: Event) -> float:
        """Asks the driver."""
        return self._device.seconds_between(earlier, self)


class CudaStaging:
    """Pages of our own, registered with the driver."""

    def __init__(self, device: CudaDevice, pages: Pages) -> None:
        self._device = device
        self._pages: Pages | None = pages
        self._lock = threading.Lock()
        self.view = pages.view
        self.address = pages.address
        self.nbytes = pages.nbytes

    def discard(self, offset: int, nbytes: int) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Unregisters the memory, then unmaps it."""
        with self._lock:
            pages, self._pages = self._pages, None
        if pages is not None:
            self._device.unregister(pages)
            pages.close()


class CudaStream(WorkOnStream):
    """A stream that does not wait for the legacy default stream, nor it for this one."""

    def __init__(self, device: CudaDevice, stream: Any, *, adopted: bool = False) -> None:
        self._device = device
        self._stream = stream
        self._adopted = adopted
        self._lock = threading.Lock()
        self._open = True
        self.handle: Any = stream.handle  #: the ``CUstream``
        self._copy = device.driver.cuMemcpyHtoDAsync

    def upload(
        self, target: DeviceMemory, target_offset: int, staging: StagingMemory, staging_offset: int, nbytes: int
    ) -> None:
        """Enqueues a copy with the driver."""
        check_upload(target, target_offset, staging, staging_offset, nbytes)
        if nbytes:
            (code,) = self._copy(
                target.address + target_offset, staging.address + staging_offset, nbytes, self._usable_handle()
            )
            if int(code) != 0:
                name = self._device.info.name
                raise CopyError(f"{name}: a copy of {nbytes} bytes: {code.name}", device=name, code=code.name)

    def decode(self, type: GGMLType, dtype: DType, source: DeviceMemory, target: DeviceMemory) -> None:  # noqa: A002
        """Launches a kernel."""
        n_blocks = check_decode(type, dtype, source, target)
        kernel = self._device.kernels.get((type, dtype))
        name = self._device.info.name
        if kernel is None:
            raise DeviceError(f"{name}: no kernel was prepared for {type.name} to {dtype}", device=name)
        self._usable_handle()
        with _mapping_errors(name, f"decoding {type.name} to {dtype}"):
            kernel.launch(self._stream, source.address, target.address, n_blocks)

    def __cuda_stream__(self) -> tuple[int, int]:
        """The protocol by which other libraries take a stream: its version, and the handle's address."""
        version, address = self._stream.__cuda_stream__()
        return int(version), int(address)

    def download(self, target: int, source: int, nbytes: int) -> None:
        """Enqueues a copy of ``nbytes`` bytes from the device to a host address."""
        self._device.check(
            "a copy to the host", self._device.driver.cuMemcpyDtoHAsync(target, source, nbytes, self._usable_handle())
        )

    def wait(self, event: Event) -> None:
        """Has the driver order the streams."""
        self._usable_handle()
        name = self._device.info.name
        with _mapping_errors(name, "a stream could not be made to wait"):
            if not isinstance(event, CudaEvent | NativeCudaEvent):
                raise DeviceError(f"{name}: {event!r} is no event of a CUDA device", device=name)
            wait = self._device.driver.cuStreamWaitEvent
            self._device.check("a stream could not be made to wait", wait(self.handle, event.handle, 0))

    def record(self, *, timing: bool = False) -> CudaEvent:
        """Records an event; a failure of the device's work shows in it as ``CopyError``."""
        self._usable_handle()
        name = self._device.info.name
        with _mapping_errors(name, "an event could not be recorded"):
            options = self._device.timing_options if timing else self._device.event_options
            return CudaEvent(self._device, self._stream.record(options=options), CopyError)

    def close(self) -> None:
        """Sleeps until the work has ended and gives the stream back."""
        with self._lock:
            if not self._open:
                return
            if self._adopted:
                self._open = False
                return
            self._device.attach()
            try:
                self.record().synchronize()
            finally:
                self._open = False
                with _mapping_errors(self._device.info.name, "a stream could not be closed"):
                    self._stream.close()

    def _usable_handle(self) -> Any:
        if not self._open:  # the driver would take the handle of a stream that is gone for whatever has it now
            name = self._device.info.name
            raise DeviceError(f"{name}: the stream is closed", device=name)
        return self.handle


class NativeWorkStream:
    """Another library's stream, for which C++ threads call the driver.

    So whoever begins and ends work keeps the interpreter lock: beside a busy thread each giving up of it costs 5 ms.
    """

    def __init__(self, device: CudaDevice, handle: int) -> None:
        self._device = device
        self._handle = handle

    def begin(self, after: Sequence[Event]) -> tuple[NativeCudaEvent, NativeCudaEvent]:
        """By one call."""
        device = self._device
        with _mapping_errors(device.info.name, "work could not be begun"):
            ready, began = device.native().begin_work(self._handle, [device.to_native(event) for event in after])
        return NativeCudaEvent(device, ready), NativeCudaEvent(device, began)

    def end(self) -> NativeCudaEvent:
        """By one call."""
        with _mapping_errors(self._device.info.name, "work could not be ended"):
            return NativeCudaEvent(self._device, self._device.native().end_work(self._handle))


class CudaDevice:
    """The CUDA device of number ``index``, in its primary context, which torch and CuPy use too.

    Raises ``BackendUnavailableError`` where packages or driver are missing, ``DeviceNotFoundError`` where there is no
    such device. Its methods make it the calling thread's current device; those of its streams and events rely on
    ``attach``.
    """

    def __init__(self, index: int = 0) -> None:
        name = f"cuda:{index}"
        self.driver = _load("cuda.bindings.driver")
        core = _load("cuda.core")
        count = _count(self.driver)
        if not 0 <= index < count:
            raise DeviceNotFoundError(f"there is no {name}: CUDA shows {count} devices", device=name)
        self._core = core
        self._index = index
        self._name = name
        self._thread = threading.local()
        self._context: Any = None
        self._lock = threading.Lock()
        self._allocated: dict[int, int] = {}
        attribute = self.driver.CUpointer_attribute
        self._pointer_attributes = [
            attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
            attribute.CU_POINTER_ATTRIBUTE_IS_MANAGED,
            attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
            attribute.CU_POINTER_ATTRIBUTE_RANGE_START_ADDR,
        ]
        self._preparing = threading.Lock()
        self._native: Any = None
        self.kernels: dict[tuple[GGMLType, DType], Any] = {}  #: that streams can launch
        with _mapping_errors(name, "the device could not be opened"):
            model = str(core.Device(index).name)
            # Without timing, which would make recording dearer; waiting threads sleep.
            self.event_options = core.EventOptions(blocking_sync=True)
            self.timing_options = core.EventOptions(blocking_sync=True, timing_enabled=True)
            core.Device(index).set_current()
        self._context = self.check("the current context", self.driver.cuCtxGetCurrent())
        total = self.memory().total
        self._info = DeviceInfo(name=name, kind="cuda", index=index, model=model, total_bytes=total)

    @property
    def info(self) -> DeviceInfo:
        """What it is."""
        return self._info

    def check(self, what: str, result: tuple[Any, ...]) -> Any:
        """The value, or the values, of a driver call; raises ``DeviceError`` with the driver's code if it failed."""
        code, *values = result
        if int(code) != 0:
            raise DeviceError(f"{self._name}: {what}: {code.name}", device=self._name, code=code.name)
        return values[0] if len(values) == 1 else tuple(values)

    def _code(self, number: int) -> str:
        """The name of what the driver returned; a number that the bindings do not know is its own."""
        try:
            return str(self.driver.CUresult(number).name)
        except ValueError:
            return str(number)

    def attach(self) -> None:
        """Makes the primary context current, unless it is."""
        self._attached()

    def _attached(self) -> Any:
        """The calling thread's ``cuda.core`` device, made current: these are one for each thread.

        What a thread of asyncload's calls does not end a capture of a CUDA graph by another thread from then on, and is
        not refused because of one.
        """
        device = getattr(self._thread, "device", None)
        if device is None or self.check("the current context", self.driver.cuCtxGetCurrent()) != self._context:
            with _mapping_errors(self._name, "the device could not be made current"):
                device = self._core.Device(self._index)
                device.set_current()
                if is_own_thread():
                    mode = self.driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
                    self.check("capture mode", self.driver.cuThreadExchangeStreamCaptureMode(mode))
            self._thread.device = device
        return device

    # Memory

    def allocate(self, nbytes: int) -> DeviceMemory:
        """Allocates with cuMemAlloc, which aligns to 256 bytes or more."""
        if nbytes == 0:
            return DeviceMemory(0, 0)
        self.attach()
        code, pointer = self.driver.cuMemAlloc(nbytes)
        if code.name == _OUT_OF_MEMORY:
            raise self._out_of_memory(nbytes)
        memory = DeviceMemory(int(self.check(f"allocating {nbytes} bytes", (code, pointer))), nbytes)
        with self._lock:
            self._allocated[memory.address] = nbytes
        return memory

    def allocate_all(self, sizes: Sequence[int]) -> list[DeviceMemory]:
        """By C++ where that is there, which gives the interpreter lock up once for all of them."""
        if self._native is None:
            return allocate_each(sizes, self.allocate, self.free)
        with self._mapping_native_errors(sum(sizes)):
            addresses = self._native.allocate(sizes)
        return self._note(addresses, sizes)

    def allocate_some(self, sizes: Sequence[int], recipient: Recipient) -> list[DeviceMemory]:
        """By C++ where that is there, and takes addresses: the interpreter lock is given up once for all of them."""
        if self._native is None or not isinstance(recipient, _load("asyncload_native").Recipient):
            return allocate_until(sizes, self.allocate, recipient)
        with self._mapping_native_errors(sum(sizes)):
            addresses = self._native.allocate_some(sizes, recipient)
        return self._note(addresses, sizes[: len(addresses)])

    def _note(self, addresses: Sequence[int], sizes: Sequence[int]) -> list[DeviceMemory]:
        memory = [DeviceMemory(address, nbytes) for address, nbytes in zip(addresses, sizes, strict=True)]
        with self._lock:
            self._allocated.update((each.address, each.nbytes) for each in memory if each.nbytes)
        return memory

    @contextmanager
    def _mapping_native_errors(self, nbytes: int) -> Generator[None]:
        try:
            yield
        except _load("asyncload_native").CudaError as error:
            if error.name == _OUT_OF_MEMORY:
                raise self._out_of_memory(nbytes) from error
            raise DeviceError(f"{self._name}: {error}", device=self._name, code=error.name) from error

    def _out_of_memory(self, nbytes: int) -> OutOfDeviceMemoryError:
        free = self.memory().free
        return OutOfDeviceMemoryError(
            f"{self._name}: {nbytes} bytes needed, {free} free",
            device=self._name,
            needed=nbytes,
            available=free,
            breakdown={},
            code=_OUT_OF_MEMORY,
        )

    def free(self, memory: DeviceMemory) -> None:
        """Frees with cuMemFree, which gives the memory back to the driver at once."""
        for error in self.free_all([memory]).values():
            raise error

    def free_all(self, memory: Collection[DeviceMemory]) -> dict[DeviceMemory, Exception]:
        """By C++ where that is there, which gives the interpreter lock up once for all of them."""
        if self._native is None:
            self.attach()
        failures: dict[DeviceMemory, Exception] = {}
        known: list[DeviceMemory] = []
        with self._lock:
            for each in memory:
                if self._allocated.get(each.address) == each.nbytes:
                    del self._allocated[each.address]
                    known.append(each)
                elif each != DeviceMemory(0, 0):
                    failures[each] = DeviceError(f"{self._name}: {each} is not allocated", device=self._name)
        for each, code in zip(known, self._free([each.address for each in known]), strict=True):
            if code:
                name = self._code(code)
                failures[each] = DeviceError(f"{self._name}: freeing {each}: {name}", device=self._name, code=name)
                with self._lock:
                    self._allocated[each.address] = each.nbytes
        return failures

    def _free(self, addresses: Sequence[int]) -> list[int]:
        """What the driver says of each, 0 where it is free."""
        if self._native is not None:
            codes: list[int] = self._native.free(addresses)
            return codes
        return [int(self.driver.cuMemFree(address)[0]) for address in addresses]

    def staging(self, nbytes: int) -> CudaStaging:
        """Maps, touches and then registers memory: 40 GB/s where cudaHostAlloc makes 3 (on an H200's host)."""
        try:
            pages = Pages(nbytes)
        except MemoryError as error:
            raise DeviceError(f"{self._name}: no staging memory: {error}", device=self._name) from error
        if nbytes:
            self.attach()
            try:
                pages.touch()
                self.check(f"pinning {nbytes} bytes", self.driver.cuMemHostRegister(pages.address, nbytes, 0))
                _registered.add(pages)
            except BaseException:
                pages.close()
                raise
        return CudaStaging(self, pages)

    def unregister(self, pages: Pages) -> None:
        """Undoes the registration of staging memory."""
        if pages.nbytes:
            self.attach()
            self.check("unpinning staging memory", self.driver.cuMemHostUnregister(pages.address))
            _registered.discard(pages)

    def download(self, memory: DeviceMemory, offset: int, buffer: memoryview) -> None:
        """Copies on a stream of its own and sleeps until that has ended."""
        check_download(memory, offset, buffer.nbytes)
        if buffer.nbytes:
            stream = self.stream()
            try:
                target = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
                stream.download(target, memory.address + offset, buffer.nbytes)
            finally:
                stream.close()

    def memory(self) -> MemoryInfo:
        """Asks the driver; other processes' memory counts too."""
        self.attach()
        free, total = self.check("asking for free memory", self.driver.cuMemGetInfo())
        return MemoryInfo(int(free), int(total))

    def process_memory(self) -> int | None:
        """Asks NVML; the process's context counts too."""
        return process_memory(self._attached())

    def residency(self, memory: DeviceMemory) -> Residency:
        """Asks the driver of the first and the last byte, and whether both are of one allocation."""
        if not memory.nbytes:
            return Residency.UNKNOWN
        self.attach()
        first, start = self._pointer(memory.address)
        last, start_of_last = self._pointer(memory.address + memory.nbytes - 1)
        if first is not Residency.DEVICE:
            return first
        return last if start == start_of_last else Residency.UNKNOWN

    def _pointer(self, address: int) -> tuple[Residency, int]:
        """Where a byte lies, and where its allocation starts."""
        # This function, other than the one for a single attribute, answers zeros for what the driver does not know.
        kind, managed, ordinal, start = self.check(
            f"asking about {address:#x}",
            self.driver.cuPointerGetAttributes(len(self._pointer_attributes), self._pointer_attributes, address),
        )
        types = self.driver.CUmemorytype
        if managed:
            residency = Residency.MANAGED
        elif kind == int(types.CU_MEMORYTYPE_HOST):
            residency = Residency.HOST
        elif kind != int(types.CU_MEMORYTYPE_DEVICE):
            residency = Residency.UNKNOWN
        else:
            residency = Residency.DEVICE if ordinal == self._index else Residency.ELSEWHERE
        return residency, int(start)

    # Work

    def prepare(self, pairs: Collection[tuple[GGMLType, DType]]) -> None:
        """Loads the kernels into the context, from the cache on disk where they have been compiled before."""
        if all(pair in self.kernels for pair in pairs):
            return
        device = self._attached()
        with self._preparing:
            missing = [pair for pair in dict.fromkeys(pairs) if pair not in self.kernels]
            if missing:
                with _mapping_errors(self._name, "the decoding kernels could not be loaded"):
                    self.kernels.update(cuda.prepare(f"sm_{device.arch}", missing))

    def stream(self) -> CudaStream:
        """Creates a non-blocking stream."""
        device = self._attached()
        with _mapping_errors(self._name, "a stream could not be created"):
            return CudaStream(self, device.create_stream())

    def adopt(self, stream: object) -> WorkStream:
        """Takes the stream's handle."""
        if isinstance(stream, CudaStream):
            self.attach()
            return stream
        with _mapping_errors(self._name, f"{type(stream).__name__} is no CUDA stream"):
            handle = _handle(stream)
            if handle == _PER_THREAD:
                raise DeviceError(
                    f"{self._name}: the per-thread default stream is no stream for all", device=self._name
                )
            if self._native is not None:
                return NativeWorkStream(self, handle)
            self.attach()
            return CudaStream(self, self._core.Stream.from_handle(handle), adopted=True)

    def barrier(self) -> CudaEvent:
        """Records an event in all streams of the context; where the driver cannot, waits for them here (spinning).

        A stream that is being captured into a graph has no work that could be waited for: the driver refuses
        (``DeviceError`` with CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED) and ends the capture.
        """
        device = self._attached()
        with _mapping_errors(self._name, "a barrier could not be set"):
            event = device.create_event(self.event_options)
            try:
                (code,) = self.driver.cuCtxRecordEvent(self._context, event.handle)
                supported = code.name not in _NO_CONTEXT_EVENTS
            except (AttributeError, RuntimeError):  # bindings or a driver older than the function
                code, supported = None, False
            if supported:
                self.check("a barrier could not be set", (code,))
            else:
                device.sync()  # an event that was never recorded counts as passed
        return CudaEvent(self, event, DeviceError)

    def seconds_between(self, earlier: Event, later: CudaEvent | NativeCudaEvent) -> float:
        """The time between two events of the device's."""
        with _mapping_errors(self._name, "there is no time between two events"):
            if not isinstance(earlier, CudaEvent | NativeCudaEvent):
                raise DeviceError(f"{self._name}: {earlier!r} is no event of a CUDA device", device=self._name)
            elapsed = self.driver.cuEventElapsedTime(earlier.handle, later.handle)
            return float(self.check("there is no time between two events", elapsed)) / 1e3

    # For C++ threads

    def native(self) -> Any:
        """The same device, in the same context, through a table of the driver's functions."""
        if self._native is None:
            module = _load("asyncload_native")
            with _mapping_errors(self._name, "the native engine cannot use the device"):
                self._native = module.CudaDevice(module.Driver(), self._index)
        return self._native

    def from_native(self, event: Any) -> NativeCudaEvent:
        """An event of a C++ thread's, for streams and for whoever waits."""
        return NativeCudaEvent(self, event)

    def to_native(self, event: Event) -> Any:
        """An event for C++ threads to wait for; whoever asks keeps it until they have."""
        if not isinstance(event, CudaEvent | NativeCudaEvent):
            raise DeviceError(f"{self._name}: {event!r} is no event of a CUDA device", device=self._name)
        if event.native is None:
            event.native = self.native().adopt_event(event.handle)
        return event.native

    def native_kernel(self, type: GGMLType, dtype: DType) -> tuple[int, int]:  # noqa: A002 - the field's name
        """A prepared kernel's function."""
        kernel = self.kernels[type, dtype]
        return kernel.handle, kernel.blocks_per_group

    def close(self) -> None:
        """Ends the C++ threads that call the driver; the primary context is kept for whoever holds memory."""
        if self._native is not None:
            self._native.close()
