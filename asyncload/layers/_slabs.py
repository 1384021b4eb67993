"""Layers in registered host memory: a slab each, of exactly their size."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial

import anyio

from asyncload.device import StagingMemory
from asyncload.pipeline import Engine, read_patiently
from asyncload.plan import SLOT_ALIGNMENT, Decode, LayerPlan, Piece, TensorPlan, cut_tensor
from asyncload.quant import decode
from asyncload.source import BlockingSource, Source, check_read

__all__ = ["Slabs", "places"]


class Slabs:
    """What is uploaded of layers, by their numbers; ``fill`` reads it, once."""

    def __init__(self, engine: Engine, layers: Sequence[LayerPlan]) -> None:
        """Allocates; blocks. Raises ``DeviceError`` where the host has too little memory."""
        self._engine = engine
        self._layers = layers
        self._memory: dict[int, StagingMemory] = {}
        engine.device.attach()
        try:
            for layer in layers:
                self._memory[layer.number] = engine.device.staging(sum(size for _, _, size in places(layer)))
        except BaseException:
            self.close()
            raise

    def __getitem__(self, layer: int) -> StagingMemory:
        """A layer's slab."""
        return self._memory[layer]

    async def fill(self, sources: Sequence[Source]) -> None:
        """Reads all layers, on the engine's reading threads; raises the first of what the sources raise."""
        errors: list[Exception] = []
        room = anyio.Semaphore(self._engine.python.options.threads + 1)

        async def work(tensor: str, read: Callable[[], Awaitable[None]]) -> None:
            try:
                await read_patiently(self._engine.python.options, tensor, read)
            except Exception as error:  # noqa: BLE001 - raised below, without the task group's wrapping
                errors.append(error)
                group.cancel_scope.cancel()
            finally:
                room.release()

        async with anyio.create_task_group() as group:
            for tensor, read in self._reads(sources):
                await room.acquire()
                group.start_soon(work, tensor, read)
        if errors:
            raise errors[0]

    def _reads(self, sources: Sequence[Source]) -> Iterator[tuple[str, Callable[[], Awaitable[None]]]]:
        """Reads that a thread makes in one go, each with its tensor's name."""
        for layer in self._layers:
            for tensor, offset, _ in places(layer):
                slab, source = self._memory[layer.number].view[offset:], sources[tensor.info.part]
                for piece in cut_tensor(tensor, self._engine.python.options.chunk_size):
                    yield tensor.info.name, partial(self._read, tensor, piece, source, slab)

    async def _read(self, tensor: TensorPlan, piece: Piece, source: Source, slab: memoryview) -> None:
        """Reads a piece to its place in the tensor's part of a slab, decoded if the host decodes."""
        offset, readers = tensor.info.offset + piece.offset, self._engine.python.readers
        check_read(source, offset, piece.nbytes)
        by_host = tensor.decode is Decode.HOST
        buffer = memoryview(bytearray(piece.nbytes)) if by_host else slab[piece.offset :][: piece.nbytes]
        if isinstance(source, BlockingSource):
            await readers.run(source.read_into_blocking, offset, buffer)
        else:
            await source.read_into(offset, buffer)
        if by_host:
            target = slab[piece.target_offset :][: piece.target_nbytes]
            await readers.run(decode, tensor.info.type, tensor.dtype, buffer, target)

    def close(self) -> None:
        """Gives the memory back; no copy reads it any more. Blocks."""
        for memory in self._memory.values():
            memory.close()
        self._memory.clear()


def places(layer: LayerPlan) -> Iterator[tuple[TensorPlan, int, int]]:
    """A layer's tensors with their offsets in its slab, and what each takes there.

    They are aligned as in a slot, so that a layer which nobody decodes behind the bus is one copy.
    """
    offset = 0
    for tensor, _ in layer.placed:
        size = -(-tensor.upload_nbytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
        yield tensor, offset, size
        offset += size
