"""The race kit on a CUDA device: kernels sleep in its streams, before the copies and within the work."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib import import_module
from typing import Any

from asyncload.device import Device, DeviceMemory, Stream, open_device
from asyncload.loader import Loader
from asyncload.options import Options
from asyncload.testing._cuda_kernel import SleepingKernel
from asyncload.testing._layer_rig import POISON, LayerConsumer, LayerRig, RaceDevice, Wait
from asyncload.threads import run_in_thread

__all__ = ["cuda_rig"]


@asynccontextmanager
async def cuda_rig(kernel: SleepingKernel, options: Options, *, lost: Wait | None = None) -> AsyncGenerator[LayerRig]:
    """A loader over the kernel's device, which poisons what it frees, without the ``lost`` wait."""
    bus = _Bus(kernel)
    inner = await run_in_thread(open_device, f"cuda:{kernel.index}")
    device = RaceDevice(inner, before_copy=bus.delay, before_free=bus.poison, lost=lost)
    async with Loader(device, options=options) as loader, _CudaRig(loader, inner, bus) as rig:
        yield rig


class _Bus:
    """What a device does more slowly, or beside, on the threads that use it."""

    def __init__(self, kernel: SleepingKernel) -> None:
        self.kernel = kernel
        self.driver: Any = import_module("cuda.bindings.driver")
        self.seconds = 0.0

    def delay(self, stream: Stream) -> None:
        if self.seconds:
            self.kernel.sleep(stream, self.seconds)

    def poison(self, memory: DeviceMemory) -> None:
        if memory.nbytes:
            self.check(self.driver.cuMemsetD8(memory.address, POISON, memory.nbytes))

    @staticmethod
    def check(result: tuple[Any, ...]) -> None:
        if int(result[0]) != 0:
            raise RuntimeError(f"the driver refuses: {result[0].name}")


class _CudaRig(LayerRig):
    def __init__(self, loader: Loader, device: Device, bus: _Bus) -> None:
        super().__init__(loader)
        self._device = device
        self._bus = bus

    def slow_bus(self, seconds: float) -> None:
        self._bus.seconds = seconds

    def make_consumer(self, room: int, *, seconds: float, poison: bool, seed: int) -> LayerConsumer:
        return _CudaConsumer(self._device, self._bus, room, seconds=seconds, poison=poison, seed=seed)


class _CudaConsumer(LayerConsumer):
    def __init__(self, device: Device, bus: _Bus, room: int, *, seconds: float, poison: bool, seed: int) -> None:
        super().__init__(device, room, seconds=seconds, poison=poison, seed=seed)
        self._kernel, self._driver, self._check = bus.kernel, bus.driver, bus.check
        self.stream: Any = bus.kernel.stream()  # foreign to asyncload, as a framework's is

    def enqueue_copy(self, target: int, source: int, nbytes: int) -> None:
        self._check(self._driver.cuMemcpyDtoHAsync(target, source, nbytes, self.stream.handle))

    def enqueue_sleep(self, seconds: float) -> None:
        self._kernel.sleep(self.stream, seconds)

    def enqueue_fill(self, address: int, nbytes: int) -> None:
        self._check(self._driver.cuMemsetD8Async(address, POISON, nbytes, self.stream.handle))

    def wait(self) -> None:
        self.stream.sync()

    def close_stream(self) -> None:
        self.stream.close()
