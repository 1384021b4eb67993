"""Layers in registered host memory: a slab each, of exactly their size."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import anyio

from asyncload.device import StagingMemory
from asyncload.pipeline import Engine, read_patiently
from asyncload.plan import SLOT_ALIGNMENT, Decode, LayerPlan, TensorPlan
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

        async def work(read: Callable[[], Awaitable[None]]) -> None:
            try:
                await read_patiently(self._engine.python.options, read)
            except Exception as error:  # noqa: BLE001 - raised below, without the task group's wrapping
                errors.append(error)
                group.cancel_scope.cancel()
            finally:
                room.release()

        async with anyio.create_task_group() as group:
            for read in self._reads(sources):
                await room.acquire()
                group.start_soon(work, read)
        if errors:
            raise errors[0]

    def _reads(self, sources: Sequence[Source]) -> Iterator[Callable[[], Awaitable[None]]]:
        """Pieces of work that a thread does in one go."""
        for layer in self._layers:
            for tensor, offset, _ in places(layer):
                slab, info = self._memory[layer.number].view[offset:], tensor.info
                by_host = tensor.decode is Decode.HOST
                before, after = (info.type.type_size, tensor.block_nbytes) if by_host else (1, 1)
                step = max(1, self._engine.python.options.chunk_size // (before + after)) * before
                for start in range(0, info.nbytes, step):
                    nbytes = min(step, info.nbytes - start)
                    target = slab[start // before * after : (start + nbytes) // before * after]
                    piece = _Piece(tensor, sources[info.part], info.offset + start, nbytes, target)
                    yield partial(piece.read, self._engine)

    def close(self) -> None:
        """Gives the memory back; no copy reads it any more. Blocks."""
        for memory in self._memory.values():
            memory.close()
        self._memory.clear()


@dataclass(frozen=True, slots=True)
class _Piece:
    """``nbytes`` of a tensor at ``offset`` of its source, and where they go, decoded if the host decodes."""

    tensor: TensorPlan
    source: Source
    offset: int
    nbytes: int
    target: memoryview

    async def read(self, engine: Engine) -> None:
        check_read(self.source, self.offset, self.nbytes)
        by_host = self.tensor.decode is Decode.HOST
        buffer = memoryview(bytearray(self.nbytes)) if by_host else self.target
        if isinstance(self.source, BlockingSource):
            await engine.python.readers.run(self.source.read_into_blocking, self.offset, buffer)
        else:
            await self.source.read_into(self.offset, buffer)
        if by_host:
            await engine.python.readers.run(decode, self.tensor.info.type, self.tensor.dtype, buffer, self.target)


def places(layer: LayerPlan) -> Iterator[tuple[TensorPlan, int, int]]:
    """A layer's tensors with their offsets in its slab, and what each takes there.

    They are aligned as in a slot, so that a layer which nobody decodes behind the bus is one copy.
    """
    offset = 0
    for tensor, _ in layer.placed:
        size = -(-tensor.upload_nbytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
        yield tensor, offset, size
        offset += size
