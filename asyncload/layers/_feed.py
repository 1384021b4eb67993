"""How a layer's bytes get into a slot: from host memory of its own, or straight from the file."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import cycle

from asyncload.device import DeviceMemory, Event, StagingMemory, Stream
from asyncload.errors import DeviceError
from asyncload.layers._slabs import Slabs, places
from asyncload.layers._slots import Slot
from asyncload.layers._sweep import Fed
from asyncload.memory import Scratch
from asyncload.pipeline import Engine, Sink
from asyncload.plan import Decode, LayerPlan, TensorPlan, cut_tensor
from asyncload.source import Source
from asyncload.threads import Threads

__all__ = ["FileFeed", "Settle", "SlabFeed"]

# Waits, off the loop, until events have passed; raises ``DeviceError`` if work before one failed.
Settle = Callable[[Sequence[Event]], Awaitable[None]]


class SlabFeed:
    """Copies layers out of slabs, registered host memory of exactly their size; one thread enqueues.

    A layer that nothing decodes lies in its slab as in the slot, and is one copy. What the device decodes comes in
    pieces through a scratch for each of several streams, so that one copies while another decodes.
    """

    def __init__(self, engine: Engine, slabs: Slabs, settle: Settle, *, decodes: bool) -> None:
        """Opens streams and scratch; blocks."""
        self._settle = settle
        self._device = engine.device
        self._spans = engine.spans
        self._slabs = slabs
        self._thread = Threads(1, "asyncload-layers", nice=engine.python.options.nice)
        self._piece = engine.python.options.chunk_size
        self._streams: list[Stream] = []
        streams = engine.python.options.streams if decodes else 1
        self._scratch = Scratch(engine.tracker, self._piece, streams)
        self._packed: Sequence[DeviceMemory] = ()  # by stream; only where the device decodes
        try:
            for _ in range(streams):
                self._streams.append(engine.device.stream())
            if decodes:
                self._packed = self._scratch.acquire()
        except BaseException:
            self.close()
            raise

    async def __call__(self, layer: LayerPlan, slot: Slot) -> Fed:
        """Enqueues a layer's copies and kernels, and waits for the work before it in the slot."""
        busy = slot.busy
        fed = await self._thread.run(self._enqueue, layer, slot)
        with suppress(DeviceError):  # the consumer's, whose own stream reports it
            await self._settle(busy)
        return fed

    async def fill(self, sources: Sequence[Source]) -> None:
        """Reads all layers into their slabs."""
        await self._slabs.fill(sources)

    def _enqueue(self, layer: LayerPlan, slot: Slot) -> Fed:
        self._device.attach()
        begun: list[Event] = []
        with self._spans.span(f"enqueue layer {layer.number}"):
            for stream in self._streams:
                for event in slot.busy:
                    stream.wait(event)
                begun.append(stream.record(timing=True))
            try:
                self._copy(layer, slot.memory)
            except Exception:
                with suppress(DeviceError):  # the first one counts
                    slot.busy = self._record()
                raise
            slot.busy = self._record()
        arrived = slot.busy
        around = [*zip(begun, arrived, strict=True)]
        return Fed(arrived, lambda: [[each] for each in around], partial(self._settle, arrived))

    def _record(self) -> list[Event]:
        """Events behind what is enqueued by now, one for each stream."""
        return [stream.record(timing=True) for stream in self._streams]

    def _copy(self, layer: LayerPlan, slot: DeviceMemory) -> None:
        slab = self._slabs[layer.number]
        if not self._packed:
            self._streams[0].upload(slot, 0, slab, 0, slab.nbytes)
            return
        lanes = cycle(zip(self._streams, self._packed, strict=True))
        for (tensor, at), (_, offset, _) in zip(layer.placed, places(layer), strict=True):
            target = slot.part(at, tensor.nbytes)
            if tensor.decode is Decode.DEVICE:
                self._decode(tensor, target, slab, offset, lanes)
            else:
                stream, _ = next(lanes)
                stream.upload(target, 0, slab, offset, tensor.nbytes)

    def _decode(
        self,
        tensor: TensorPlan,
        target: DeviceMemory,
        slab: StagingMemory,
        offset: int,
        lanes: Iterator[tuple[Stream, DeviceMemory]],
    ) -> None:
        for piece in cut_tensor(tensor, self._piece):
            stream, scratch = next(lanes)
            packed = scratch.part(0, piece.nbytes)
            stream.upload(packed, 0, slab, offset + piece.offset, piece.nbytes)
            decoded = target.part(piece.target_offset, piece.target_nbytes)
            stream.decode(tensor.info.type, tensor.dtype, packed, decoded)

    def close(self) -> None:
        """Waits for what is under way and ends thread, streams, scratch and slabs; blocks.

        All of them, also where one cannot be ended; raises ``DeviceError`` then.
        """
        with ExitStack() as stack:
            stack.callback(self._slabs.close)
            if self._packed:
                self._packed = ()
                stack.callback(self._scratch.release)
            for stream in self._streams:
                stack.callback(stream.close)
            self._thread.close()
            self._device.attach()


class _SlotSink(Sink):
    """A layer's tensors go into a slot, once what still uses that has ended."""

    def __init__(self, layer: LayerPlan, slot: Slot) -> None:
        self._targets = [slot.memory.part(offset, tensor.nbytes) for tensor, offset in layer.placed]
        self.after = slot.busy

    def target(self, tensor: int) -> DeviceMemory:
        """Its part of the slot."""
        return self._targets[tensor]


class FileFeed:
    """Reads layers from the file each time they are needed, through the loader's staging buffers and streams.

    What the device decodes goes through the loader's scratch, which stays as long as this does, or each layer would
    allocate it anew.
    """

    def __init__(self, engine: Engine, sources: Sequence[Source], *, decodes: bool) -> None:
        """Blocks."""
        self._backend = engine.backend(sources)
        self._callers = engine.callers
        self._sources = sources
        self._decodes = decodes
        if decodes:
            self._backend.scratch.acquire()

    async def __call__(self, layer: LayerPlan, slot: Slot) -> Fed:
        """Moves a layer, to its arrival."""
        transfer = self._backend.transfer(layer.load, self._sources, _SlotSink(layer, slot), timed=True)
        try:
            await self._callers.run(transfer.prepare)
            transfer.admit()
            await transfer.run()
        finally:
            await transfer.end()
        slot.busy = []  # the copies came behind it, and have arrived
        return Fed(copies=transfer.copies)

    def close(self) -> None:
        """Gives the scratch back."""
        if self._decodes:
            self._backend.scratch.release()
