"""The race kit on the host device: its latency is the slow bus, and functions on its streams are the work."""

from __future__ import annotations

import ctypes
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial

from asyncload.device import HostDevice
from asyncload.loader import Loader
from asyncload.options import Options
from asyncload.testing._layer_rig import POISON, LayerConsumer, LayerRig, NativeRaceDevice, RaceDevice, Wait

__all__ = ["host_rig"]


@asynccontextmanager
async def host_rig(options: Options, *, lost: Wait | None = None) -> AsyncGenerator[LayerRig]:
    """A loader over a poisoning ``HostDevice`` that stands for a GPU, without the ``lost`` wait.

    Its engine is the native one if ``options`` ask for that.
    """
    device = HostDevice(poison=True)
    race = (NativeRaceDevice if options.engine == "native" else RaceDevice)(device, lost=lost)
    async with Loader(race, options=options) as loader, _HostRig(loader, device) as rig:
        yield rig


class _HostRig(LayerRig):
    def __init__(self, loader: Loader, device: HostDevice) -> None:
        super().__init__(loader)
        self._device = device

    def slow_bus(self, seconds: float) -> None:
        self._device.latency = seconds

    def make_consumer(self, room: int, *, seconds: float, poison: bool, seed: int) -> LayerConsumer:
        return _HostConsumer(self._device, room, seconds=seconds, poison=poison, seed=seed)


class _HostConsumer(LayerConsumer):
    def __init__(self, device: HostDevice, room: int, *, seconds: float, poison: bool, seed: int) -> None:
        super().__init__(device, room, seconds=seconds, poison=poison, seed=seed)
        self.stream = self._stream = device.stream()

    def enqueue_copy(self, target: int, source: int, nbytes: int) -> None:
        self._stream.call(partial(ctypes.memmove, target, source, nbytes))

    def enqueue_sleep(self, seconds: float) -> None:
        self._stream.call(partial(time.sleep, seconds))

    def enqueue_fill(self, address: int, nbytes: int) -> None:
        self._stream.call(partial(ctypes.memset, address, POISON, nbytes))

    def wait(self) -> None:
        self._stream.record().synchronize()

    def close_stream(self) -> None:
        self._stream.close()
