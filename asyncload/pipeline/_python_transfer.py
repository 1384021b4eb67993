"""The way of a load's bytes: producers, one bounded queue, consumers, completions.

Who owns a staging buffer is always plain: the transfer, from the moment it is acquired until its copies are submitted;
the stream, until their event has passed. What the device decodes is copied into the stream's scratch, and the kernel
comes behind the copy. A task never goes on while a thread still works for it (see
``asyncload.threads``), so when all tasks have ended, what the transfer still holds is idle and goes back at once, and
what the streams hold comes back by itself: that is the drain.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from asyncload.device import DeviceMemory, Event, Stream
from asyncload.errors import DeviceError
from asyncload.memory import StagingBuffer
from asyncload.pipeline._backend import Sink
from asyncload.pipeline._read import read_patiently
from asyncload.pipeline._stats import LoadStats, Stats
from asyncload.pipeline._streams import StreamWorker
from asyncload.plan import Chunk, Decode, LoadPlan
from asyncload.quant import decode
from asyncload.source import BlockingSource, Source, check_read
from asyncload.threads import LoopHandle, settle

if TYPE_CHECKING:
    from asyncload.pipeline._python import PythonBackend

__all__ = ["PythonTransfer"]


@dataclass(slots=True)
class _Filled:
    chunk: Chunk
    buffer: StagingBuffer
    begun: Event | None = None  # where copies are timed


@dataclass(slots=True)
class _Arrival:
    chunk: Chunk
    stream: StreamWorker
    error: BaseException | None


class PythonTransfer:
    """Moves the tensors of a plan from their sources into device memory, once, but for those to skip.

    If it is to be ``timed``, ``copies`` has, by stream, the events before and behind each chunk's copies and kernels.
    """

    def __init__(
        self,
        backend: PythonBackend,
        plan: LoadPlan,
        sources: Sequence[Source],
        sink: Sink,
        *,
        skip: Collection[int],
        timed: bool,
    ) -> None:
        self._backend, self._plan, self._sink = backend, plan, sink
        # asked once: isinstance of a protocol looks at all of its members
        self._sources = [(source, source if isinstance(source, BlockingSource) else None) for source in sources]
        kinds = sorted({type(source).__name__ for source in sources})
        self._stats = Stats(backend.options, f"by Python, from {', '.join(kinds)}")
        self._copies: list[list[tuple[Event, Event]]] = [[] for _ in backend.streams]
        self._timed = timed
        self._chunks: Iterator[Chunk] = plan.chunks(skip)
        self._group = -1
        self._missing = [tensor.nbytes for tensor in plan.tensors]
        self._tensors_left = len(plan.tensors) - len(skip)
        self._share = backend.staging.share()
        self._scratch: Sequence[DeviceMemory] = ()  # by stream; only where the device decodes
        self._held: set[StagingBuffer] = set()  # touched on the loop only
        self._lock = threading.Lock()
        self._arrivals: deque[_Arrival] = deque()
        self._on_device = 0
        self._error: BaseException | None = None

    @property
    def copies(self) -> Callable[[], Sequence[Sequence[tuple[Event, Event]]]]:
        """Has them already."""
        copies = self._copies
        return lambda: copies

    def stats(self) -> LoadStats:
        """Where its time went, until now."""
        return self._stats.result()

    def prepare(self) -> None:
        """Has the scratch allocated, if the device decodes."""
        if self._plan.kernels(Decode.DEVICE) and self._tensors_left:
            self._scratch = self._backend.scratch.acquire()

    def recipient(self, tensors: Sequence[int]) -> None:
        """Nobody: it begins when it is run."""

    def admit(self) -> None:
        """Nothing: it begins when it is run."""

    async def end(self) -> None:
        """Gives the scratch back."""
        if self._scratch:
            self._scratch = ()
            self._backend.scratch.release(unused=not self._tensors_left)

    async def run(self) -> None:
        """Moves everything."""
        self._loop = LoopHandle()
        self._next_chunk = anyio.Lock(fast_acquire=True)
        self._drained = anyio.Event()
        self._finished = anyio.Event()
        try:
            await self._run_tasks()
        finally:
            await self._drain()
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # it refers to this frame

    async def _run_tasks(self) -> None:
        if not self._tensors_left:
            return
        options, streams = self._backend.options, self._backend.streams
        send, receive = anyio.create_memory_object_stream[_Filled](options.buffers)
        with send, receive:
            async with anyio.create_task_group() as group:
                for _ in range(options.threads + 1):  # one more, so that a buffer is at hand when a thread is free
                    group.start_soon(self._guard, self._produce, send)
                for stream in streams:
                    group.start_soon(self._guard, self._consume, receive, stream)
                await self._finished.wait()
                group.cancel_scope.cancel()
        if not self._finished.is_set():  # a task was cancelled from outside, by the loop's own end
            raise anyio.get_cancelled_exc_class()

    async def _drain(self) -> None:
        for buffer in self._held:
            buffer.release()
        self._held.clear()
        if self._on_device:
            self._drained = anyio.Event()
            await settle(self._drained)
        self._take_arrivals()  # what came last and the loop was only told of

    async def _guard(self, work: Callable[..., Awaitable[object]], *args: object) -> None:
        try:
            await work(*args)
        except Exception as error:  # noqa: BLE001 - it is raised by run, without the task group's wrapping
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if self._error is None:
            self._error = error
        elif error is not self._error:
            self._error.add_note(f"then also: {type(error).__name__}: {error}")
        self._finished.set()

    # Producers

    async def _produce(self, send: MemoryObjectSendStream[_Filled]) -> None:
        while True:
            async with self._next_chunk:  # in order, so that groups are admitted one after the other
                chunk = next(self._chunks, None)
                if chunk is None:
                    return
                if chunk.group != self._group:
                    self._group = chunk.group
                    await self._sink.admit([segment.tensor for segment in chunk.segments])
                buffer = await self._share.acquire()
                self._held.add(buffer)
            await self._fill(chunk, buffer)
            send.send_nowait(_Filled(chunk, buffer))  # there is room for as many as there are buffers

    async def _fill(self, chunk: Chunk, buffer: StagingBuffer) -> None:
        source, blocking = self._sources[chunk.part]
        check_read(source, chunk.offset, chunk.nbytes)

        async def read() -> None:
            if blocking is not None:
                await self._backend.readers.run(self._read_and_decode, blocking, chunk, buffer)
                return
            with self._stats.working("read", chunk.nbytes):
                await source.read_into(chunk.offset, buffer.view[: chunk.nbytes])
            await self._backend.readers.run(self._decode, chunk, buffer)

        await read_patiently(self._backend.options, self._name(chunk), read, self._stats.retried)

    def _read_and_decode(self, source: BlockingSource, chunk: Chunk, buffer: StagingBuffer) -> None:
        with self._backend.spans.span(f"read {self._name(chunk)}"), self._stats.working("read", chunk.nbytes):
            source.read_into_blocking(chunk.offset, buffer.view[: chunk.nbytes])
        self._decode(chunk, buffer)

    def _decode(self, chunk: Chunk, buffer: StagingBuffer) -> None:
        for segment in chunk.segments:
            tensor = self._plan.tensors[segment.tensor]
            if tensor.decode is Decode.HOST and segment.target_nbytes:
                with (
                    self._backend.spans.span(f"decode {tensor.info.name}"),
                    self._stats.working("decode", segment.target_nbytes),
                ):
                    decode(
                        tensor.info.type,
                        tensor.dtype,
                        buffer.view[segment.source_offset : segment.source_offset + segment.source_nbytes],
                        buffer.view[segment.upload_offset : segment.upload_offset + segment.target_nbytes],
                    )

    # Consumers

    async def _consume(self, receive: MemoryObjectReceiveStream[_Filled], stream: StreamWorker) -> None:
        while True:  # until all has arrived and the group is cancelled
            filled = await receive.receive()
            targets = [self._sink.target(segment.tensor) for segment in filled.chunk.segments]
            await stream.room.acquire()
            self._held.discard(filled.buffer)
            with self._lock:
                self._on_device += 1
            stream.submit(
                self._name(filled.chunk),
                partial(self._enqueue, filled, targets, self._scratch[stream.index] if self._scratch else None),
                partial(self._passed, filled, stream),
                timing=self._timed,
            )

    def _enqueue(
        self, filled: _Filled, targets: Sequence[DeviceMemory], scratch: DeviceMemory | None, stream: Stream
    ) -> None:
        """Enqueues a chunk's copies and kernels, behind what still uses their targets; on the stream's thread."""
        for event in self._sink.after:
            stream.wait(event)
        if self._timed:
            filled.begun = stream.record(timing=True)
        buffer = filled.buffer
        for segment, target in zip(filled.chunk.segments, targets, strict=True):
            if not segment.target_nbytes:
                continue
            tensor, staged = self._plan.tensors[segment.tensor], buffer.offset + segment.upload_offset
            if tensor.decode is Decode.DEVICE:
                assert scratch is not None
                packed = scratch.part(segment.source_offset, segment.source_nbytes)
                decoded = target.part(segment.target_offset, segment.target_nbytes)
                stream.upload(packed, 0, buffer.memory, staged, segment.upload_nbytes)
                stream.decode(tensor.info.type, tensor.dtype, packed, decoded)
            else:
                stream.upload(target, segment.target_offset, buffer.memory, staged, segment.upload_nbytes)

    def _passed(
        self, filled: _Filled, stream: StreamWorker, error: BaseException | None, begin: float, event: Event | None
    ) -> None:
        """An event has passed; on the stream's thread."""
        if filled.begun is not None and event is not None:
            self._copies[stream.index].append((filled.begun, event))
        self._stats.uploaded(begin, time.perf_counter(), filled.chunk.upload_nbytes, filled.chunk.target_nbytes)
        try:
            filled.buffer.release()
        except DeviceError as failure:
            error = error or failure
        with self._lock:
            self._on_device -= 1
            self._arrivals.append(_Arrival(filled.chunk, stream, error))
            told = len(self._arrivals) > 1
        if not told:  # else the loop takes this one along
            self._loop.post(self._take_arrivals)

    def _take_arrivals(self) -> None:
        """Accounts for what has arrived; on the loop."""
        while True:
            with self._lock:
                if not self._arrivals:
                    break
                arrival = self._arrivals.popleft()
            arrival.stream.room.release()
            if arrival.error is not None:
                self._name_tensor(arrival.error, arrival.chunk)
                self._fail(arrival.error)
            else:
                try:
                    self._arrived(arrival.chunk)
                except BaseException as error:  # noqa: BLE001 - a callback's for example: it comes out of run
                    self._fail(error)
        if not self._on_device:
            self._drained.set()

    def _arrived(self, chunk: Chunk) -> None:
        landed: list[int] = []
        for segment in chunk.segments:
            self._missing[segment.tensor] -= segment.target_nbytes
            if self._missing[segment.tensor] == 0:
                landed.append(segment.tensor)
        self._tensors_left -= len(landed)
        if landed:
            self._sink.landed(landed)
        self._sink.moved(chunk.target_nbytes)
        if not self._tensors_left:
            self._finished.set()

    def _name(self, chunk: Chunk) -> str:
        """That of the first of the tensors that share a chunk."""
        return self._plan.tensors[chunk.segments[0].tensor].info.name

    def _name_tensor(self, error: BaseException, chunk: Chunk) -> None:
        """Says which tensor failed work belonged to."""
        name = self._name(chunk)
        if not isinstance(error, DeviceError):
            error.add_note(f"while {name} was on its way")
        elif error.tensor is None:
            error.tensor, error.offset = name, chunk.offset
