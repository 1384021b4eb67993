"""Layers out of slabs, enqueued by C++ threads: no Python runs for a piece of a layer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import anyio

from asyncload.device import DeviceMemory, Event
from asyncload.errors import ClosedError, CopyError
from asyncload.layers._slabs import Slabs, places
from asyncload.layers._slots import Slot
from asyncload.layers._sweep import Fed
from asyncload.memory import Allocation, Purpose
from asyncload.pipeline import Engine, NativeBackend, Sink
from asyncload.plan import SLOT_ALIGNMENT, Decode, LayerPlan, LoadPlan, TensorPlan, cut_tensor
from asyncload.source import Source

__all__ = ["NativeSlabFeed"]

_STREAMS: Final = 2  # one copies while the other decodes

# Waits, off the loop, for events that C++ threads cannot wait for, and raises what ``Event.synchronize`` raises.
WaitForEvents = Callable[[Sequence[Event]], Awaitable[None]]


@dataclass(slots=True)
class _Pending:
    """Something that was asked of the C++ threads."""

    done: anyio.Event = field(default_factory=anyio.Event)
    error: Exception | None = None


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

    ``waiters`` C++ threads wait for events; ``wait`` is for those for which they cannot. ``listen`` is its one task.
    """

    def __init__(
        self,
        engine: Engine,
        backend: NativeBackend,
        slabs: Slabs,
        layers: Sequence[LayerPlan],
        *,
        waiters: int,
        wait: WaitForEvents,
    ) -> None:
        """Opens streams and scratch; blocks."""
        import numpy as np

        self._engine, self._backend, self._slabs, self._layers, self._wait = engine, backend, slabs, layers, wait
        self._device = backend.device
        self._indices = {layer.number: index for index, layer in enumerate(layers)}
        self._pending: dict[int, _Pending] = {}
        self._scratch: list[Allocation] = []
        decodes = any(tensor.decode is Decode.DEVICE for layer in layers for tensor, _ in layer.placed)
        streams = min(_STREAMS, backend.options.streams) if decodes else 1
        self._piece = backend.options.scratch // streams // SLOT_ALIGNMENT * SLOT_ALIGNMENT
        self._feed: Any = None
        try:
            if decodes:
                for index in range(streams):
                    description = f"packed bytes of layers, stream {index}"
                    self._scratch.append(engine.tracker.allocate(self._piece, Purpose.SCRATCH, description))
            self._feed = backend.module.LayerFeed(
                self._device.native(),
                [np.array(list(self._pieces(layer)), np.uint64).reshape(-1, 6) for layer in layers],
                streams=streams,
                scratch=[scratch.address for scratch in self._scratch],
                waiters=waiters,
                nice=backend.options.nice,
            )
        except BaseException:
            self.close()
            raise

    def _pieces(self, layer: LayerPlan) -> Iterator[tuple[int, ...]]:
        """What ``asyncload_native.LayerFeed`` says of a layer: in one piece, unless the device decodes some of it."""
        slab = self._slabs[layer.number]
        if not self._scratch:
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
                    packed = replace(tensor, decode=Decode.NONE, nbytes=tensor.info.nbytes)
                tensors.append((packed, memory.part(offset, packed.nbytes)))
        tensors.sort(key=lambda placed: (placed[0].info.part, placed[0].info.offset))
        plan = LoadPlan(tuple(tensor for tensor, _ in tensors), self._backend.options.chunk_size)
        transfer = self._backend.fill(plan, sources, _SlabSink([memory for _, memory in tensors]))
        try:
            await self._engine.callers.run(transfer.prepare)
            transfer.admit(len(tensors))
            await transfer.run()
        finally:
            await transfer.end()

    async def listen(self) -> None:
        """Hears from the C++ threads until it is cancelled; who still waits then is told so."""
        try:
            while True:
                await anyio.wait_readable(self._feed.descriptor)
                for ticket in self._feed.poll():
                    self._tell(ticket)
        finally:
            for pending in self._pending.values():
                pending.error = ClosedError("the layer stream has been closed")
                pending.done.set()

    def _tell(self, ticket: Any) -> None:
        pending = self._pending.pop(ticket.number, None)
        if pending is None:  # whoever asked was cancelled
            return
        if ticket.failure is not None:
            name = self._device.info.name
            pending.error = CopyError(f"{name}: {ticket.failure}", device=name, code=ticket.code or None)
        pending.done.set()

    async def _outcome(self, number: int) -> None:
        pending = self._pending[number] = _Pending()
        try:
            await pending.done.wait()
        finally:
            self._pending.pop(number, None)
        if pending.error is not None:
            raise pending.error

    async def __call__(self, layer: LayerPlan, slot: Slot) -> Fed:
        """Enqueues a layer's copies and kernels."""
        after = [(event, self._device.to_native(event)) for event in slot.busy]
        if others := [event for event, native in after if native is None]:
            await self._wait(others)
        feeding = self._feed.feed(
            self._indices[layer.number], slot.memory.address, [native for _, native in after if native is not None]
        )
        begun, arrived = (
            [self._device.from_native(event) for event in events] for events in (feeding.begun, feeding.arrived)
        )
        slot.busy = arrived
        await self._outcome(feeding.number)
        return Fed(arrived, [[around] for around in zip(begun, arrived, strict=True)])

    async def settle(self, events: Sequence[Event]) -> None:
        """Waits until events have passed; raises ``DeviceError`` if work before one failed."""
        native = [self._device.to_native(event) for event in events]
        if any(event is None for event in native):
            await self._wait(events)
        else:
            await self._outcome(self._feed.settle(native))

    def close(self) -> None:
        """Waits for what is under way and ends threads, streams and scratch; blocks."""
        if self._feed is not None:
            self._feed.close()
        self._scratch.clear()
        self._slabs.close()
