"""What the race kit drives an engine with: a slow bus, and consumers that are slow to read a layer and then poison it.

Whatever is read too early, or written too early, shows: memory holds poison until a layer's bytes have come, and again
once the work on the layer has ended.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any, Self

from asyncload.device import Device, DeviceInfo, DeviceMemory, Event, StagingMemory, Stream, WorkStream
from asyncload.gguf import GGMLType
from asyncload.layers import Layer
from asyncload.loader import Loader
from asyncload.pipeline import NativeDevice
from asyncload.quant import DType
from asyncload.testing._device_proxy import DeviceProxy, StreamProxy
from asyncload.threads import run_in_thread

__all__ = ["POISON", "LayerConsumer", "LayerRig", "NativeRaceDevice", "RaceDevice", "Wait", "differences"]

POISON = 0xA5  #: what memory is filled with that nobody is to read


class Wait(StrEnum):
    """The two waits between streams that layer streaming stands on."""

    COPY_FOR_WORK = "the copies of a layer wait for the work on the one before in its slot"
    WORK_FOR_COPY = "the work on a layer waits for its copies"


class RaceDevice(DeviceProxy):
    """A device whose memory needs streams, with hooks at its own streams; those it adopts are the consumers'.

    ``before_copy`` is called with the stream before each copy is enqueued, ``before_free`` before memory is freed, both
    on the caller's thread. The ``lost`` wait is not made.
    """

    def __init__(
        self,
        inner: Device,
        *,
        before_copy: Callable[[Stream], None] | None = None,
        before_free: Callable[[DeviceMemory], None] | None = None,
        lost: Wait | None = None,
    ) -> None:
        super().__init__(inner)
        self._before_copy = before_copy
        self._before_free = before_free
        self._lost = lost

    @property
    def info(self) -> DeviceInfo:
        """The inner device's, but that the host does no work on its memory."""
        return replace(self.inner.info, needs_stream=True)

    def stream(self) -> Stream:
        """A stream that copies."""
        return _RaceStream(self.inner.stream(), self._before_copy, waits=self._lost is not Wait.COPY_FOR_WORK)

    def adopt(self, stream: object) -> WorkStream:
        """A stream that works."""
        work = super().adopt(stream)
        return _RacingWork(work) if self._lost is Wait.WORK_FOR_COPY else work

    def free(self, memory: DeviceMemory) -> None:
        """Calls the hook, then frees."""
        if self._before_free is not None:
            self._before_free(memory)
        super().free(memory)


class NativeRaceDevice(RaceDevice):
    """One that C++ threads copy to, whose streams have no hooks.

    ``unrecorded`` is an event by its handle, that nobody records: the ``lost`` wait of copies is one for it.
    """

    def __init__(
        self,
        inner: NativeDevice,
        *,
        before_free: Callable[[DeviceMemory], None] | None = None,
        lost: Wait | None = None,
        unrecorded: int = 0,
    ) -> None:
        super().__init__(inner, before_free=before_free, lost=lost)
        self._native = inner
        self._unrecorded = unrecorded

    def native(self) -> Any:
        """The inner device's."""
        return self._native.native()

    def from_native(self, event: Any) -> Event:
        """The inner device's."""
        return self._native.from_native(event)

    def to_native(self, event: Event) -> Any:
        """The inner device's, unless that wait is lost."""
        if self._lost is Wait.COPY_FOR_WORK:
            return self.native().adopt_event(self._unrecorded)
        return self._native.to_native(event)

    def native_kernel(self, type: GGMLType, dtype: DType) -> tuple[int, int]:  # noqa: A002
        """The inner device's."""
        return self._native.native_kernel(type, dtype)


class _RaceStream(StreamProxy):
    def __init__(self, inner: Stream, before_copy: Callable[[Stream], None] | None, *, waits: bool) -> None:
        super().__init__(inner)
        self._before_copy = before_copy
        self._waits = waits

    def upload(
        self, target: DeviceMemory, target_offset: int, staging: StagingMemory, staging_offset: int, nbytes: int
    ) -> None:
        if self._before_copy is not None:
            self._before_copy(self.inner)
        super().upload(target, target_offset, staging, staging_offset, nbytes)

    def wait(self, event: Event) -> None:
        if self._waits:
            super().wait(event)


class _RacingWork:
    """Work that waits for nothing."""

    def __init__(self, inner: WorkStream) -> None:
        self._inner = inner

    def begin(self, after: Sequence[Event]) -> tuple[Event, Event]:
        """Not after them."""
        del after
        return self._inner.begin(())

    def end(self) -> Event:
        """The inner one's."""
        return self._inner.end()


class LayerConsumer(ABC):
    """Work on a stream of its own that reads all bytes of the layers it is given, ``room`` bytes at most.

    It sleeps for up to ``seconds`` within each tensor, by ``seed``. With ``poison`` it overwrites a layer that streams
    when it has read it; no other consumer may use that layer then. A subclass says how work is enqueued. Blocks.
    """

    def __init__(self, device: Device, room: int, *, seconds: float, poison: bool, seed: int) -> None:
        device.attach()
        self._device = device
        self._room: StagingMemory = device.staging(room)
        self._used = 0
        self._read: list[tuple[str, int, int]] = []
        self._random = random.Random(seed)  # noqa: S311 - cases, not secrets
        self._poison = poison
        self.seconds = seconds

    #: What ``layer.on`` takes.
    stream: object

    @abstractmethod
    def enqueue_copy(self, target: int, source: int, nbytes: int) -> None:
        """From the device to a host address."""

    @abstractmethod
    def enqueue_sleep(self, seconds: float) -> None:
        """So long."""

    @abstractmethod
    def enqueue_fill(self, address: int, nbytes: int) -> None:
        """With poison."""

    @abstractmethod
    def wait(self) -> None:
        """Until the stream's work has ended; blocks."""

    @abstractmethod
    def close_stream(self) -> None:
        """Once its work has ended; blocks."""

    def use(self, layer: Layer) -> None:
        """Enters the layer's block and enqueues the work."""
        with layer.on(self.stream):
            self.work(layer)

    def work(self, layer: Layer) -> None:
        """Enqueues the work on a layer whose block the caller is in; returns at once."""
        self._device.attach()
        for tensor in layer.values():
            half = tensor.nbytes // 2
            if self._used + tensor.nbytes > self._room.nbytes:
                raise ValueError(f"a consumer with room for {self._room.nbytes} bytes was to read more")
            target = self._room.address + self._used
            self.enqueue_copy(target, tensor.address, half)
            if pause := self._random.choice([0.0, 0.0, self.seconds]):
                self.enqueue_sleep(pause)
            self.enqueue_copy(target + half, tensor.address + half, tensor.nbytes - half)
            self._read.append((tensor.name, self._used, tensor.nbytes))
            self._used += tensor.nbytes
        if self._poison and not layer.resident:
            for tensor in layer.values():
                self.enqueue_fill(tensor.address, tensor.nbytes)

    def take(self) -> dict[str, bytes]:
        """Each tensor's bytes as they were read since the last call, once all work has ended; blocks."""
        self._device.attach()
        self.wait()
        found = {name: bytes(self._room.view[at : at + nbytes]) for name, at, nbytes in self._read}
        self.forget()
        return found

    def forget(self) -> None:
        """Drops what was read until now, or is going to be."""
        self._read.clear()
        self._used = 0  # what comes is read by the same stream, later

    def close(self) -> None:
        """Waits for the work and gives everything back; blocks."""
        self._device.attach()
        self.wait()
        self.close_stream()
        self._room.close()


class LayerRig(ABC):
    """An engine's ``loader`` over a slow device, and consumers, which are closed with the rig's block."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self._consumers: list[LayerConsumer] = []

    @abstractmethod
    def slow_bus(self, seconds: float) -> None:
        """Has each copy from now on take so much longer."""

    @abstractmethod
    def make_consumer(self, room: int, *, seconds: float, poison: bool, seed: int) -> LayerConsumer:
        """Blocks."""

    async def consumer(self, room: int, *, seconds: float = 0.0, poison: bool = True, seed: int = 0) -> LayerConsumer:
        """A new consumer."""

        def make() -> None:
            self._consumers.append(self.make_consumer(room, seconds=seconds, poison=poison, seed=seed))

        await run_in_thread(make)
        return self._consumers[-1]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for consumer in self._consumers:
            await run_in_thread(consumer.close)


def differences(found: Mapping[str, bytes], expected: Mapping[str, bytes]) -> list[str]:
    """How what was found differs from what was expected, a line for each name; empty where nothing does."""
    lines = [f"{name}: not expected" for name in found.keys() - expected.keys()]
    for name, right in expected.items():
        content = found.get(name)
        if content is None:
            lines.append(f"{name}: not found")
        elif len(content) != len(right):
            lines.append(f"{name}: {len(content)} bytes, not {len(right)}")
        elif content != right:
            wrong = [at for at, pair in enumerate(zip(content, right, strict=True)) if pair[0] != pair[1]]
            poison = sum(content[at] == POISON for at in wrong)
            lines.append(
                f"{name}: {len(wrong)} of {len(right)} bytes wrong, from {wrong[0]} on, {poison} of them poison"
            )
    return lines
