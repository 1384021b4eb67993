"""Every byte of every sweep, over a slow bus and slow compute, and what happens when one of the waits is missing."""

from __future__ import annotations

import ctypes
import random
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncload.device import Event, HostDevice
from asyncload.device._host_stream import HostStream
from asyncload.layers import Layer
from asyncload.loader import Loader
from asyncload.threads import run_in_thread
from tests.layers.models import SMALL, Content, finish, layers_only, make_model

pytestmark = pytest.mark.anyio


class Consumer:
    """Work on a stream of the device that reads a layer's bytes slowly, from its first to its last."""

    def __init__(self, stream: HostStream, seed: int) -> None:
        self.stream = stream
        self.seen: Content = {}
        self._random = random.Random(seed)

    def use(self, layer: Layer) -> None:
        with layer.on(self.stream):
            for tensor in layer.values():
                self.stream.call(self._reader(tensor.name, tensor.address, tensor.nbytes))

    def _reader(self, name: str, address: int, nbytes: int) -> Callable[[], None]:
        pause = self._random.choice([0.0, 0.0, 0.002])

        def read() -> None:
            device = np.ctypeslib.as_array((ctypes.c_ubyte * nbytes).from_address(address))
            half = nbytes // 2
            first = device[:half].tobytes()
            time.sleep(pause)
            self.seen[name] = first + device[half:].tobytes()

        return read


class RaceDevice(HostDevice):
    """A slow device whose copies poison their target, wait, and only then move; its streams can be made to lose waits.

    A layer that is read before it has arrived is poison then, and one that is read while the next is written too.
    """

    def __init__(self, *, bandwidth: float | None, without: Collection[str] = ()) -> None:
        super().__init__(bandwidth=bandwidth, latency=0.0005, poison=True)
        self._without = without

    def stream(self) -> HostStream:
        stream = super().stream()
        if "copies wait for work" in self._without:
            stream.wait = _lose  # type: ignore[method-assign, assignment]
        return stream

    def compute_stream(self) -> HostStream:
        """A stream for consumers."""
        stream = super().stream()
        if "work waits for copies" in self._without:
            stream.wait = _lose  # type: ignore[method-assign, assignment]
        return stream


def _lose(_event: Event) -> None:
    """No wait at all."""


async def sweep(device: RaceDevice, path: Path, *, slots: int, sweeps: int = 3, **more: Any) -> list[Content]:
    """What a consumer saw in each sweep."""
    seen: list[Content] = []
    async with (
        Loader(device, options=SMALL) as loader,
        loader.stream(path, dtype="f16", slots=slots, allow=["stream"], workspace=0, kv_bytes=0, **more) as layers,
    ):
        layers._active().wait_for_arrival = False  # the device alone orders
        stream = device.compute_stream()
        for number in range(sweeps):
            consumer = Consumer(stream, seed=number)
            async for layer in layers:
                consumer.use(layer)
            await run_in_thread(finish, device, stream)
            seen.append(consumer.seen)
        await run_in_thread(stream.close)
    return seen


@pytest.mark.parametrize("slabs", [True, False])
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize(("layers", "slots"), [(1, 1), (2, 1), (5, 1), (4, 2), (5, 2), (6, 3), (7, 3), (3, 8), (9, 8)])
async def test_every_byte_of_every_sweep(tmp_path: Path, layers: int, slots: int, *, uneven: bool, slabs: bool) -> None:
    path, expected = await make_model(tmp_path / "model.gguf", layers, uneven=uneven)
    for seen in await sweep(RaceDevice(bandwidth=300e6), path, slots=slots, host="slabs" if slabs else "file"):
        assert seen == layers_only(expected)


@pytest.mark.parametrize("without", ["copies wait for work", "work waits for copies"])
async def test_without_either_wait_bytes_are_wrong(tmp_path: Path, without: str) -> None:
    path, expected = await make_model(tmp_path / "model.gguf", 6, uneven=True)
    seen = await sweep(RaceDevice(bandwidth=100e6, without=[without]), path, slots=2, sweeps=5)
    assert any(content != layers_only(expected) for content in seen)
