"""Layers out of slabs, enqueued by C++ threads: no Python runs for a piece of a layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import anyio

from asyncload.device import DeviceMemory, Event
from asyncload.errors import CopyError, DeviceError
from asyncload.layers._feed import Settle
from asyncload.layers._slabs import Slabs, places
from asyncload.layers._slots import Slot
from asyncload.layers._sweep import Fed
from asyncload.memory import Scratch
from asyncload.pipeline import Engine, NativeBackend, Sink, ThreadSpan
from asyncload.plan import SLOT_ALIGNMENT, Decode, LayerPlan, LoadPlan, TensorPlan, cut_tensor
from asyncload.source import Source

__all__ = ["NativeSlabFeed"]

_STREAMS: Final = 2  # one copies while the other decodes
# What ``asyncload_native.LayerFeed`` notes of its threads: their names, and what they do for a layer.
_SPANS: Final = {  # of the C++ threads, each of which does one thing
    "enqueue": ("feed", "enqueue layer"),
    "await_slot": ("slots", "wait for the slot of layer"),
    "await_copies": ("copy", "wait for layer"),
}


@dataclass(slots=True)
class _Feeding:
    """A layer that the C++ threads bring into a slot."""

    after: Sequence[Event]  # which they use until they have told of it
    enqueued: anyio.Event = field(default_factory=anyio.Event)  # and what had the slot before has ended
    arrived: anyio.Event = field(default_factory=anyio.Event)
    around: list[tuple[Event, Event]] = field(default_factory=list[tuple[Event, Event]])  # the copies, by stream
    error: Exception | None = None

    async def arrival(self) -> None:
        """Waits for it."""
        await self.arrived.wait()
        if self.error is not None:
            raise self.error


class _SlabSink(Sink):
    """Layers' tensors go into slabs, as they are uploaded from there."""

    hears = "end"

    def __init__(self, targets: Sequence[DeviceMemory]) -> None:
        self._targets = targets

    def target(self, tensor: int) -> DeviceMemory:
        """Its part of a slab."""
        return self._targets[tensor]


class NativeSlabFeed:
    """Copies layers out of slabs, registered host memory of exactly their size, as ``SlabFeed`` does.

    ``settle`` waits for events for which C++ threads cannot. ``listen`` is its one task. Where the device waits for
    layers, the event loop wakes when one can be handed out, and once at the end of a sweep; on the host, when one has
    arrived.
    """

    def __init__(
        self,
        engine: Engine,
        backend: NativeBackend,
        slabs: Slabs,
        layers: Sequence[LayerPlan],
        settle: Settle,
        *,
        trace: bool,
    ) -> None:
        """Opens streams and scratch; blocks."""
        import numpy as np

        self._engine, self._backend, self._slabs, self._layers, self._settle = engine, backend, slabs, layers, settle
        self._device = backend.device
        self._indices = {layer.number: index for index, layer in enumerate(layers)}
        self._turn = anyio.Lock(fast_acquire=True)
        self._feedings: dict[int, _Feeding] = {}
        self._packed: Sequence[DeviceMemory] = ()  # by stream; only where the device decodes
        decodes = any(tensor.decode is Decode.DEVICE for layer in layers for tensor, _ in layer.placed)
        streams = min(_STREAMS, backend.options.streams) if decodes else 1
        self._piece = backend.options.scratch // streams // SLOT_ALIGNMENT * SLOT_ALIGNMENT
        self._scratch = Scratch(engine.tracker, self._piece, streams)
        self._feed: Any = None
        try:
            if decodes:
                self._packed = self._scratch.acquire()
            self._feed = backend.module.LayerFeed(
                self._device.native(),
                [np.array(list(self._pieces(layer)), np.uint64).reshape(-1, 6) for layer in layers],
                streams=streams,
                scratch=[memory.address for memory in self._packed],
                each_arrival=not self._device.info.needs_stream,
                trace=trace,
                nice=backend.options.nice,
            )
        except (backend.module.DeviceError, OSError) as error:  # the latter: no descriptor, or no thread, is left
            self.close()
            name = self._device.info.name
            code = getattr(error, "name", None)
            raise DeviceError(f"{name}: layers cannot be fed: {error}", device=name, code=code) from error
        except BaseException:
            self.close()
            raise

    def _pieces(self, layer: LayerPlan) -> Iterator[tuple[int, ...]]:
        """What ``asyncload_native.LayerFeed`` says of a layer: in one piece, unless the device decodes some of it."""
        slab = self._slabs[layer.number]
        if not self._packed:
            yield slab.address, slab.nbytes, 0, 0, 0, 0
            return
        for (tensor, at), (_, offset, _) in zip(layer.placed, places(layer), strict=True):
            if tensor.decode is not Decode.DEVICE:
                yield slab.address + offset, tensor.nbytes, at, 0, 0, 0
                continue
            kernel = self._device.native_kernel(tensor.info.type, tensor.dtype)
            for piece in cut_tensor(tensor, self._piece):
                source, count = slab.address + offset + piece.offset, piece.nbytes // tensor.info.type.type_size
                yield source, piece.nbytes, at + piece.target_offset, *kernel, count

    async def fill(self, sources: Sequence[Source]) -> None:
        """Reads all layers into their slabs."""
        tensors: list[tuple[TensorPlan, DeviceMemory]] = []
        for layer in self._layers:
            slab = self._slabs[layer.number]
            memory = DeviceMemory(slab.address, slab.nbytes)
            for tensor, offset, _ in places(layer):
                packed = tensor
                if tensor.decode is Decode.DEVICE:
                    packed = tensor._replace(decode=Decode.NONE, nbytes=tensor.info.nbytes)
                tensors.append((packed, memory.part(offset, packed.nbytes)))
        tensors.sort(key=lambda placed: (placed[0].info.part, placed[0].info.offset))
        plan = LoadPlan(tuple(tensor for tensor, _ in tensors), self._backend.options.chunk_size)
        transfer = self._backend.fill(plan, sources, _SlabSink([memory for _, memory in tensors]))
        try:
            await self._engine.callers.run(transfer.prepare)
            transfer.admit()
            await transfer.run()
        finally:
            await transfer.end()

    async def listen(self) -> None:
        """Hears from the C++ threads until it is cancelled."""
        while True:
            await anyio.wait_readable(self._feed.descriptor)
            self.hear()

    def hear(self) -> None:
        """Takes what has come."""
        for news in self._feed.poll():
            self._take(news)

    def _take(self, news: Any) -> None:
        feeding = self._feedings[news.number]
        if news.failure is not None:
            name, failure = self._device.info.name, news.failure
            raised = CopyError if failure.of_copy else DeviceError
            feeding.error = raised(f"{name}: {failure.what}", device=name, code=failure.code or None)
        if news.has_arrived:
            feeding.arrived.set()
        else:
            begun, arrived = ([*map(self._device.from_native, events)] for events in (news.begun, news.arrived))
            feeding.around = [*zip(begun, arrived, strict=False)]  # fewer, where it failed
            feeding.enqueued.set()
        if news.has_arrived or news.failure is not None:
            del self._feedings[news.number]

    async def __call__(self, layer: LayerPlan, slot: Slot) -> Fed:
        """Has a layer's copies and kernels enqueued, and waits for the work before it in the slot."""
        feeding = _Feeding(slot.busy)
        async with self._turn:  # by the order of feedings it is known that all have arrived
            after = [(event, self._device.to_native(event)) for event in slot.busy]
            with suppress(DeviceError):  # the consumer's, whose own stream reports it
                await self._settle([event for event, native in after if native is None])
            number = self._feed.feed(
                self._indices[layer.number], slot.memory.address, [native for _, native in after if native is not None]
            )
            self._feedings[number] = feeding
        await feeding.enqueued.wait()
        arrived = [event for _, event in feeding.around]
        if feeding.error is not None:
            slot.busy = [*slot.busy, *arrived]
            raise feeding.error
        slot.busy = arrived
        around = feeding.around
        return Fed(arrived, lambda: [[each] for each in around], feeding.arrival)

    def take_spans(self) -> Iterator[ThreadSpan]:
        """What the C++ threads did since they were last asked, if that is noted."""
        spans: list[tuple[str, int, int, float, float]] = self._feed.take_spans()
        for what, _, index, begin, end in spans:
            thread, did = _SPANS[what]
            yield ThreadSpan(f"asyncload-{thread}", f"{did} {self._layers[index].number}", begin, end)

    def close(self) -> None:
        """Waits for what is under way and ends threads, streams and scratch; blocks."""
        if self._feed is not None:
            self._feed.close()
        self._feedings.clear()
        if self._packed:
            self._packed = ()
            self._scratch.release()
        self._slabs.close()
