"""The race kit on a CUDA device: kernels sleep in its streams, before the copies and within the work."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from importlib import import_module
from typing import Any
from unittest.mock import patch

from asyncload.device import Device, DeviceMemory, open_device
from asyncload.loader import Loader
from asyncload.options import Options
from asyncload.pipeline import NativeDevice
from asyncload.testing._cuda_kernel import SleepingKernel, check
from asyncload.testing._layer_rig import POISON, LayerConsumer, LayerRig, NativeRaceDevice, RaceDevice, Wait
from asyncload.threads import run_in_thread

__all__ = ["cuda_rig"]


@asynccontextmanager
async def cuda_rig(kernel: SleepingKernel, options: Options, *, lost: Wait | None = None) -> AsyncGenerator[LayerRig]:
    """A loader over the kernel's device, which poisons what it frees, without the ``lost`` wait.

    Its engine is the native one if ``options`` ask for that; only what comes out of slabs has a slow bus then.
    """
    bus = _Bus(kernel)
    inner = await run_in_thread(open_device, f"cuda:{kernel.index}")
    device: RaceDevice
    if options.engine == "native":
        assert isinstance(inner, NativeDevice)
        device = NativeRaceDevice(inner, before_free=bus.poison, lost=lost, unrecorded=bus.unrecorded)
    else:
        device = RaceDevice(inner, before_copy=bus.delay, before_free=bus.poison, lost=lost)
    with _slow_feeds(bus) if options.engine == "native" else nullcontext():
        async with Loader(device, options=options) as loader, _CudaRig(loader, inner, bus) as rig:
            yield rig


class _Bus:
    """What a device does more slowly, or beside, on the threads that use it."""

    def __init__(self, kernel: SleepingKernel) -> None:
        self.kernel = kernel
        self.driver: Any = import_module("cuda.bindings.driver")
        self.seconds = 0.0
        self._unrecorded = check(self.driver.cuEventCreate(0))

    @property
    def unrecorded(self) -> int:
        """An event that nobody records, by its handle; it is never destroyed, as a test has few of them."""
        return int(self._unrecorded)

    def delay(self, stream: Any) -> None:
        if self.seconds:
            self.kernel.sleep(stream, self.seconds)

    def poison(self, memory: DeviceMemory) -> None:
        if memory.nbytes:
            check(self.driver.cuMemsetD8(memory.address, POISON, memory.nbytes))


@contextmanager
def _slow_feeds(bus: _Bus) -> Generator[None]:
    """Has the C++ feeds that are made meanwhile come over the bus."""
    module: Any = import_module("asyncload_native")
    make = module.LayerFeed

    def make_slow(*arguments: Any, **options: Any) -> _SlowFeed:
        return _SlowFeed(make(*arguments, **options), bus)

    with patch.object(module, "LayerFeed", make_slow):
        yield


class _SlowFeed:
    """A ``LayerFeed``, with the bus's sleeps in its streams before each layer."""

    def __init__(self, feed: Any, bus: _Bus) -> None:
        self._feed, self._bus = feed, bus

    def __getattr__(self, name: str) -> Any:
        return getattr(self._feed, name)

    def feed(self, *arguments: Any) -> Any:
        for handle in self._feed.streams:
            self._bus.delay(_Handle(handle))
        return self._feed.feed(*arguments)


class _Handle:
    """A stream by its handle."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


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
        self._kernel, self._driver = bus.kernel, bus.driver
        self.stream: Any = bus.kernel.stream()  # foreign to asyncload, as a framework's is

    def enqueue_copy(self, target: int, source: int, nbytes: int) -> None:
        check(self._driver.cuMemcpyDtoHAsync(target, source, nbytes, self.stream.handle))

    def enqueue_sleep(self, seconds: float) -> None:
        self._kernel.sleep(self.stream, seconds)

    def enqueue_fill(self, address: int, nbytes: int) -> None:
        check(self._driver.cuMemsetD8Async(address, POISON, nbytes, self.stream.handle))

    def wait(self) -> None:
        self.stream.sync()

    def close_stream(self) -> None:
        self.stream.close()
