"""The backend in C++: the threads of ``asyncload_native``, which need the interpreter for nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from importlib import import_module
from typing import Any, Final, Protocol, runtime_checkable

import anyio

from asyncload.device import Device, DeviceMemory, Event
from asyncload.errors import (
    BackendUnavailableError,
    CopyError,
    DeviceError,
    PlanError,
    SourceChangedError,
    SourceReadError,
)
from asyncload.gguf import GGMLType
from asyncload.memory import Scratch, VramTracker
from asyncload.options import Options
from asyncload.pipeline._backend import Sink
from asyncload.pipeline._spans import ThreadSpan, ThreadSpans
from asyncload.pipeline._stats import LoadStats, load_stats, stage_workers
from asyncload.plan import Decode, LoadPlan, TensorPlan
from asyncload.quant import DType, kernel_address
from asyncload.source import NativeFileSource, Source

__all__ = ["NativeBackend", "NativeDevice"]

_log: Final = logging.getLogger("asyncload.load")

_PLACES: Final = {Decode.NONE: 0, Decode.HOST: 1, Decode.DEVICE: 2}
_SPANS: Final = {"read": "read", "decode": "decode", "enqueue": "enqueue", "await_copies": "wait for"}


@runtime_checkable
class NativeDevice(Device, Protocol):
    """A device that C++ threads can use."""

    def native(self) -> Any:
        """The ``asyncload_native.Device``, the same each time."""
        ...

    def from_native(self, event: Any) -> Event:
        """An event of a C++ thread's, for streams and for whoever waits."""
        ...

    def to_native(self, event: Event) -> Any:
        """An event for C++ threads to wait for, as long as it is kept; None for one for which they cannot."""
        ...

    def native_kernel(self, type: GGMLType, dtype: DType) -> tuple[int, int]:  # noqa: A002 - the field's name
        """The handle of a prepared kernel, and how many blocks each of its groups of threads decodes."""
        ...


class NativeBackend:
    """Reads local files; opening it blocks.

    Raises ``BackendUnavailableError`` where the extension was not built, or cannot use the device.
    """

    def __init__(self, device: Device, tracker: VramTracker, spans: ThreadSpans, options: Options) -> None:
        try:
            self.module: Any = import_module("asyncload_native")
        except ImportError as error:
            raise BackendUnavailableError(
                f"the native engine is not there: {error}", device=device.info.name
            ) from error
        if not isinstance(device, NativeDevice):
            raise BackendUnavailableError(
                f"the native engine cannot use {type(device).__name__}", device=device.info.name
            )
        self.device = device
        self.spans = spans
        self.options = options = replace(options, engine="native").suited_to(device.info.kind)
        self.scratch = Scratch(tracker, options.chunk_size, options.scratch_chunks)
        with ExitStack() as stack:
            ring = device.staging(options.buffers * options.chunk_size)
            stack.callback(ring.close)
            try:
                self.engine = self.module.Engine(
                    device.native(),
                    ring,
                    chunk_size=options.chunk_size,
                    threads=options.threads,
                    buffers=options.buffers,
                    nice=options.nice,
                    retries=options.retries,
                    retry_delay=options.retry_delay,
                )
            except (self.module.DeviceError, OSError) as error:
                name = device.info.name
                raise DeviceError(f"{name}: {error}", device=name, code=getattr(error, "name", None)) from error
            stack.callback(self.engine.close)
            self._stack = stack.pop_all()

    def reads(self, sources: Sequence[Source]) -> bool:
        """Whether all of them are files that it can read."""
        return all(isinstance(source, NativeFileSource) for source in sources)

    def transfer(
        self, plan: LoadPlan, sources: Sequence[Source], sink: Sink, *, skip: Collection[int] = (), timed: bool = False
    ) -> NativeTransfer:
        """A transfer by the engine's threads, which may be ``timed`` by events around its copies; from files."""
        return NativeTransfer(self, plan, sources, sink, skip=skip, timed=timed)

    def fill(self, plan: LoadPlan, sources: Sequence[Source], sink: Sink) -> NativeTransfer:
        """A transfer into host memory, whatever the device, which decodes nothing then."""
        return NativeTransfer(self, plan, sources, sink, to_host=True)

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not self.engine.busy

    def close(self) -> None:
        """Ends the threads, and gives the ring back; blocks."""
        self._stack.close()


class NativeTransfer:
    """A job of the engine's, and what the event loop hears of it."""

    def __init__(
        self,
        backend: NativeBackend,
        plan: LoadPlan,
        sources: Sequence[Source],
        sink: Sink,
        *,
        skip: Collection[int] = (),
        timed: bool = False,
        to_host: bool = False,
    ) -> None:
        self._backend, self._plan, self._sink = backend, plan, sink
        self._sources = [source for source in sources if isinstance(source, NativeFileSource)]
        self._skip = skip
        self._timed, self._to_host = timed, to_host
        self._begin = time.perf_counter()
        self._job: Any = None
        self._news: Any = None  # the last
        self._landed = 0  # bytes
        self._missing = len(plan.tensors) - len(skip)  # tensors
        self._error: BaseException | None = None
        self._scratch: Sequence[DeviceMemory] = ()
        self._admission: Any = None

    def stats(self) -> LoadStats:
        """Where its time went, until now."""
        times, wall = self._job.times(), time.perf_counter() - self._begin
        seconds = {"read": times.read, "decode": times.decode, "upload": times.upload}
        nbytes = {"read": times.read_nbytes, "decode": times.decoded_nbytes, "upload": times.uploaded_nbytes}
        workers, reading = stage_workers(self._backend.options), self._job.reading
        return load_stats(wall, workers, seconds, nbytes, self._landed, times.retries, reading)

    @property
    def copies(self) -> Callable[[], Sequence[Sequence[tuple[Event, Event]]]]:
        """Makes nothing of the engine's events before it is called."""
        job, take = self._job, self._backend.device.from_native
        return lambda: [[(take(begun), take(arrived)) for begun, arrived in copies] for copies in job.copies()]

    def _spans(self) -> Iterator[ThreadSpan]:
        """What the engine's threads did, under the names that the other backend's threads give to it."""
        spans: list[tuple[str, int, int, float, float]] = self._job.take_spans()
        for what, thread, tensor, begin, end in spans:
            name = self._plan.tensors[tensor].info.name
            yield ThreadSpan(f"asyncload-worker_{thread}", f"{_SPANS[what]} {name}", begin, end)

    async def run(self) -> None:
        """Moves everything."""
        try:
            if self._sink.limits:
                async with anyio.create_task_group() as group:
                    group.start_soon(self._admit_in_turn)
                    await self._follow()
                    group.cancel_scope.cancel()
            else:
                await self._follow()
        finally:
            await self._give_up()
        if self._error is None and self._news.failure is not None:
            self._error = self._describe(self._news.failure)
        if self._error is None and self._missing:  # a model is whole or an error
            name = self._backend.device.info.name
            self._error = DeviceError(f"{name}: the engine was closed before {self._missing} tensors came", device=name)
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # it refers to this frame

    def prepare(self) -> None:
        """Hands the plan to the engine."""
        backend, module = self._backend, self._backend.module
        files = [source.open_file() for source in self._sources]
        table = self._table()
        if self._plan.kernels(Decode.DEVICE):
            self._scratch = backend.scratch.acquire()
        try:
            job = module.Job(
                files=files,
                tensors=table,
                chunk_size=self._plan.chunk_size,
                rising=backend.options.threads,
                wake=getattr(module.Wake, self._sink.hears.upper()),
                to_host=self._to_host,
                timed=self._timed,
                ahead=not self._sink.limits,
            )
        except ValueError as error:
            raise PlanError(str(error)) from error
        except OSError as error:  # no descriptor is left
            url = self._sources[0].url
            raise SourceReadError(f"{url}: {error.strerror}", url=url, errno=error.errno, transient=True) from error
        after = [backend.device.to_native(event) for event in self._sink.after]
        for event, native in zip(self._sink.after, after, strict=True):
            if native is None:
                with suppress(DeviceError):  # what failed before it does not stop the work after it
                    event.synchronize()
        backend.engine.submit(
            job, [memory.address for memory in self._scratch], [event for event in after if event is not None]
        )
        self._job = job

    def _table(self) -> Any:
        """The tensors as ``asyncload_native.Job`` takes them, a row each."""
        import numpy as np

        ways: dict[tuple[GGMLType, DType, Decode], tuple[int, ...]] = {}
        rows: list[tuple[int, ...]] = []
        for index, tensor in enumerate(self._plan.tensors):
            info, dtype, _, decode, nbytes = tensor
            way = info.type, dtype, decode
            if way not in ways:
                ways[way] = self._way(tensor)
            rows.append((info.part, info.offset, info.nbytes, nbytes, *ways[way], index in self._skip))
        return np.array(rows, np.uint64).reshape(-1, 10)

    def _way(self, tensor: TensorPlan) -> tuple[int, ...]:
        """Where a tensor is decoded, a block's bytes before and after that, and the kernel."""
        type_, dtype = tensor.info.type, tensor.dtype
        kernel = (0, 0)
        if tensor.decode is Decode.HOST:
            kernel = kernel_address(type_, dtype), 0
        elif tensor.decode is Decode.DEVICE:
            kernel = self._backend.device.native_kernel(type_, dtype)
        return _PLACES[tensor.decode], type_.type_size, tensor.block_nbytes, *kernel

    # Admission

    def recipient(self, tensors: Sequence[int]) -> Any:
        """An ``asyncload_native.Admission``."""
        import numpy as np

        awaited = set(tensors)
        targets = [0 if index in awaited else self._target(index) for index in range(len(self._plan.tensors))]
        backend = self._backend
        self._admission = backend.module.Admission(backend.engine, self._job, np.array(targets, np.uint64), tensors)
        return self._admission

    def admit(self) -> None:
        """Has everything moved that the recipient has not admitted."""
        admitted = 0 if self._admission is None else self._admission.admitted
        if admitted < len(self._plan.tensors):
            self._admit(range(admitted, len(self._plan.tensors)), max(self._job.groups) + 1)

    async def _admit_in_turn(self) -> None:
        """Has groups moved as the sink admits them."""
        groups: dict[int, list[int]] = {}
        for index, group in enumerate(self._job.groups):
            if index not in self._skip:
                groups.setdefault(group, []).append(index)
        try:
            for group, tensors in groups.items():
                await self._sink.admit(tensors)
                self._admit(range(tensors[0], tensors[-1] + 1), group + 1)
        except Exception as error:  # noqa: BLE001 - it is raised by run, without the task group's wrapping
            self._fail(error)

    def _admit(self, tensors: range, groups: int) -> None:
        """Tells the engine where tensors go, and how many groups may be moved."""
        import numpy as np

        addresses = [self._target(index) for index in tensors]
        self._backend.engine.admit(self._job, groups, tensors.start, np.array(addresses, np.uint64))

    def _target(self, index: int) -> int:
        return 0 if index in self._skip else self._sink.target(index).address

    # Hearing of it

    async def _follow(self) -> None:
        """Tells the sink what happens, until nothing of the job is under way."""
        while not self._hear():
            await anyio.wait_readable(self._job.descriptor)

    def _hear(self) -> bool:
        """Takes the news; whether they were the last."""
        self._news = news = self._job.poll()
        landed = news.landed  # made anew each time
        self._landed += news.moved
        self._missing -= len(landed)
        try:
            if landed:
                self._sink.landed(landed)
            if news.moved:
                self._sink.moved(news.moved)
        except BaseException as error:  # noqa: BLE001 - a callback's for example: it comes out of run, at the end
            self._fail(error)
        return bool(news.ended)

    def _fail(self, error: BaseException) -> None:
        if self._error is None:
            self._error = error
        self._backend.engine.cancel(self._job)

    async def end(self) -> None:
        """Gives scratch and descriptor back."""
        try:
            await self._give_up()
        finally:
            if self._job is not None:
                if self._timed and self._backend.spans.watched:
                    self._backend.spans.add(self._spans())
                self._job.close()
            if self._scratch:
                self._scratch = ()
                self._backend.scratch.release(unused=self._job is None or self._ended)
        if self._job is not None and _log.isEnabledFor(logging.DEBUG):
            _log.debug("%s: %s", self._sources[0].url, self._job.reading)

    async def _give_up(self) -> None:
        """Cancels what is left, and waits until nothing is under way, however often it is cancelled itself."""
        if self._job is not None and not self._ended:
            self._backend.engine.cancel(self._job)
            await self._drain()

    @property
    def _ended(self) -> bool:
        return self._news is not None and self._news.ended

    async def _drain(self) -> None:
        try:
            await self._follow()
        except anyio.get_cancelled_exc_class():
            with anyio.CancelScope(shield=True):
                while not self._ended:
                    with suppress(anyio.get_cancelled_exc_class()):  # a native one of asyncio's pierces the shield
                        await self._follow()
            raise

    def _describe(self, failure: Any) -> Exception:
        """What the other backend raises in such a case."""
        kinds, device = self._backend.module.FailureKind, self._backend.device.info.name
        tensor, file = int(failure.tensor), int(failure.file)
        name, source = self._plan.tensors[tensor].info.name, self._sources[file]
        if failure.kind == kinds.CHANGED:
            return SourceChangedError(failure.what, url=source.url)
        if failure.kind in (kinds.READ, kinds.ENDED):
            number = failure.error_number or None
            return SourceReadError(
                failure.what,
                url=source.url,
                offset=failure.offset,
                transient=failure.transient,
                errno=number,
                tensor=name,
            )
        raised = CopyError if failure.kind == kinds.COPY else DeviceError
        message, code = f"{device}: {failure.what}", failure.code or None
        return raised(message, device=device, code=code, tensor=name, offset=failure.offset)
