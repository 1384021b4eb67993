"""A device over the stand-in driver, whose work C++ threads do, and the race kit on it."""

from __future__ import annotations

import ctypes
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any, cast

from asyncload.device import (
    DeviceInfo,
    DeviceMemory,
    Event,
    HostDevice,
    MemoryInfo,
    StagingMemory,
    WorkStream,
)
from asyncload.device._cuda import NativeCudaEvent, NativeWorkStream
from asyncload.gguf import GGMLType
from asyncload.loader import Loader
from asyncload.options import Options
from asyncload.quant import DType, kernel_address
from asyncload.testing import DeviceProxy, LayerConsumer, LayerRig, NativeRaceDevice, Wait
from asyncload.testing._layer_rig import POISON
from tests.native.stub_cuda import StubCuda

__all__ = ["StubDevice", "stub_rig"]

_CAPACITY = 1 << 30
_UNTIMED = 2  # CU_EVENT_DISABLE_TIMING


class StubDevice(DeviceProxy):
    """Memory, registration, streams and events of the stand-in; kernels and the rest are the host device's."""

    def __init__(self, cuda: StubCuda) -> None:
        super().__init__(HostDevice())
        self.cuda = cuda
        cuda.attach()
        module: Any = import_module("asyncload_native")
        self._native = module.CudaDevice(module.Driver(cuda.path), 0)
        self._sizes: dict[int, int] = {}
        self._kernels: dict[tuple[GGMLType, DType], int] = {}

    @property
    def info(self) -> DeviceInfo:
        """A device that needs streams."""
        return replace(self.inner.info, needs_stream=True)

    def attach(self) -> None:
        """Makes the stand-in's context the calling thread's."""
        super().attach()
        self.cuda.attach()

    def allocate(self, nbytes: int) -> DeviceMemory:
        """The stand-in's memory."""
        if not nbytes:
            return DeviceMemory(0, 0)
        self.attach()
        memory = DeviceMemory(self.cuda.make("cuMemAlloc_v2", nbytes), nbytes)
        self._sizes[memory.address] = nbytes
        return memory

    def allocate_all(self, sizes: Sequence[int]) -> list[DeviceMemory]:
        """Each by itself: nothing fails here."""
        return [self.allocate(nbytes) for nbytes in sizes]

    def free(self, memory: DeviceMemory) -> None:
        """A violation under work."""
        if memory.nbytes:
            self.attach()
            assert self.cuda.call("cuMemFree_v2", memory.address) == 0
            del self._sizes[memory.address]

    def memory(self) -> MemoryInfo:
        """What is not allocated is free."""
        return MemoryInfo(_CAPACITY - sum(self._sizes.values()), _CAPACITY)

    def staging(self, nbytes: int) -> StagingMemory:
        """The host's memory, registered."""
        return _Staging(self, self.inner.staging(nbytes))

    def barrier(self) -> Event:
        """Waits here."""
        self.cuda.barrier()
        return self.inner.barrier()

    def adopt(self, stream: object) -> WorkStream:
        """By its handle."""
        assert isinstance(stream, int)
        return NativeWorkStream(cast("Any", self), stream)

    # For C++ threads

    def native(self) -> Any:
        """The same device."""
        return self._native

    def from_native(self, event: Any) -> NativeCudaEvent:
        """An event of a C++ thread's."""
        return NativeCudaEvent(cast("Any", self), event)

    def to_native(self, event: Event) -> Any:
        """An event that a C++ thread has recorded."""
        assert isinstance(event, NativeCudaEvent)
        return event.native

    def seconds_between(self, earlier: Event, later: NativeCudaEvent) -> float:
        """The driver's."""
        return float(later.native.seconds_since(self.to_native(earlier)))

    def native_kernel(self, type: GGMLType, dtype: DType) -> tuple[int, int]:  # noqa: A002 - the field's name
        """The host's kernel, on the stand-in's streams."""
        if (type, dtype) not in self._kernels:
            self._kernels[type, dtype] = self.cuda.kernel(kernel_address(type, dtype), blocks_per_group=1)
        return self._kernels[type, dtype], 1

    def close(self) -> None:
        """Ends the threads."""
        self._native.close()
        super().close()


class _Staging:
    """Registered until it is closed, which is a violation under work."""

    def __init__(self, device: StubDevice, inner: StagingMemory) -> None:
        self._device, self._inner = device, inner
        self.view, self.address, self.nbytes = inner.view, inner.address, inner.nbytes
        device.attach()
        if self.nbytes:
            assert device.cuda.call("cuMemHostRegister_v2", self.address, self.nbytes, 0) == 0

    def discard(self, offset: int, nbytes: int) -> None:
        self._inner.discard(offset, nbytes)

    def close(self) -> None:
        self._device.attach()
        if self.nbytes:
            assert self._device.cuda.call("cuMemHostUnregister", self.address) == 0
        self._inner.close()


@asynccontextmanager
async def stub_rig(cuda: StubCuda, options: Options, *, lost: Wait | None = None) -> AsyncGenerator[LayerRig]:
    """A loader by the native engine over the stand-in, without the ``lost`` wait."""
    device = StubDevice(cuda)
    race = NativeRaceDevice(device, lost=lost, unrecorded=cuda.make("cuEventCreate", _UNTIMED))
    async with Loader(race, options=options) as loader, _StubRig(loader, device) as rig:
        yield rig


class _StubRig(LayerRig):
    def __init__(self, loader: Loader, device: StubDevice) -> None:
        super().__init__(loader)
        self._device = device

    def slow_bus(self, seconds: float) -> None:
        self._device.cuda.delay(seconds)

    def make_consumer(self, room: int, *, seconds: float, poison: bool, seed: int) -> LayerConsumer:
        return _StubConsumer(self._device, room, seconds=seconds, poison=poison, seed=seed)


class _StubConsumer(LayerConsumer):
    def __init__(self, device: StubDevice, room: int, *, seconds: float, poison: bool, seed: int) -> None:
        super().__init__(device, room, seconds=seconds, poison=poison, seed=seed)
        self._cuda = device.cuda
        self._sleep = device.cuda.kernel(device.cuda.sleep, blocks_per_group=1)
        self._memory = device.cuda.make("cuMemAlloc_v2", 1)
        self.stream = self._stream = device.cuda.make("cuStreamCreate", 0)

    def enqueue_copy(self, target: int, source: int, nbytes: int) -> None:
        assert self._cuda.call("cuMemcpyDtoHAsync_v2", target, source, nbytes, self._stream) == 0

    def enqueue_sleep(self, seconds: float) -> None:
        microseconds = int(seconds * 1e6)
        values = (ctypes.c_uint64 * 3)(self._memory, self._memory, microseconds)
        arguments = (ctypes.c_void_p * 3)(*(ctypes.addressof(values) + 8 * index for index in range(3)))
        grid = (microseconds, 1, 1, 1, 1, 1, 0)
        assert self._cuda.call("cuLaunchKernel", self._sleep, *grid, self._stream, ctypes.byref(arguments), 0) == 0

    def enqueue_fill(self, address: int, nbytes: int) -> None:
        assert self._cuda.call("cuMemsetD8Async", address, POISON, nbytes, self._stream) == 0

    def wait(self) -> None:
        assert self._cuda.call("cuStreamSynchronize", self._stream) == 0

    def close_stream(self) -> None:
        assert self._cuda.call("cuStreamDestroy_v2", self._stream) == 0
        assert self._cuda.call("cuMemFree_v2", self._memory) == 0
