"""A model whose layers pass through slots: ``async with loader.stream(path) as layers: async for layer in layers``."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from asyncload.device import Event, WorkStream
from asyncload.errors import ClosedError
from asyncload.gguf import Header
from asyncload.interpreter_lock import waiting
from asyncload.layers import (
    FileFeed,
    Layer,
    LayerRecord,
    NativeSlabFeed,
    PassStats,
    Ride,
    Scheduler,
    Settle,
    SlabFeed,
    Slabs,
    Slot,
    Use,
    add_threads,
    measure_pass,
    record_pass,
)
from asyncload.loader._kernels import prepare_kernels
from asyncload.loader._model_load import load_model
from asyncload.loader._open import ModelPath, OpenedModel
from asyncload.loader._session import Request
from asyncload.memory import Purpose
from asyncload.model import Model, Tensor
from asyncload.options import Options
from asyncload.pipeline import Engine, NativeBackend
from asyncload.plan import Decode, DtypeSpec, LayerPlan, Plan, plan_memory
from asyncload.threads import LoopHandle, Threads

__all__ = ["LayerRide", "LayerStream", "StreamRequest"]

_READ_AT_ONCE: Final = 2  # layers that come from the file: while one arrives, the next is read
_HOST_SHARE: Final = 0.5  # of the host memory that can be had: what streams stays there if it takes no more


class LayerRide:
    """A consumer's way through the sweeps of a layer stream: each ``async for`` over it is one sweep.

    Rides that were made before a sweep begins pass it together: each gets every layer once, in order, and a slot is
    used again when all of them have finished with it. It is a context manager; at the end of the block the others do
    not wait for it any more.
    """

    def __init__(self, layers: _Layers, *, once: bool = False) -> None:
        self._layers = layers
        self._once = once
        self._position = 0
        self._last: Layer | None = None
        self._ride = layers.scheduler.join()
        self._finalizer = weakref.finalize(self, layers.loop.post, layers.scheduler.leave, self._ride)

    def __aiter__(self) -> Self:
        """The sweep that it is in, or the next one."""
        return self

    async def __anext__(self) -> Layer:
        """Gives a layer back that was never used, and waits until the next one's copies are enqueued.

        Raises what reading or copying any of the sweep's layers has raised, at the sweep's end at the latest; the ride
        is in the next sweep then. Raises ``StalledError`` if it was left behind, ``ClosedError`` after the end.
        """
        try:
            with waiting():  # also in the loop's turns, in which it gives the lock up
                return await self._step()
        except BaseException as error:
            if isinstance(error, Exception):  # and no cancellation, after which the same layer comes
                self._position = 0
            if self._once:  # not when it is collected: the error's traceback may keep it
                self.close()
            raise

    async def _step(self) -> Layer:
        await anyio.lowlevel.checkpoint()
        if self._last is not None:
            self._last.skip()
            self._last = None
        layers, number = self._layers, None
        if self._position < len(layers.order):
            number = layers.order[self._position]
        use: Use | None = None
        if number is None or number not in layers.resident:
            use = await layers.scheduler.step(self._ride, arrived=layers.wait_for_arrival)
        else:
            layers.scheduler.check_sweep(self._ride)
        if number is None:
            raise StopAsyncIteration
        self._position += 1
        self._last = layers.make(number, self._ride, use)
        return self._last

    def close(self) -> None:
        """Gives the place up; a layer that is in use stays the ride's until its block has ended."""
        self._layers.scheduler.leave(self._ride)
        self._finalizer.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Layers:
    """What a layer stream has while it is entered."""

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        model: Model,
        feed: FileFeed | SlabFeed | NativeSlabFeed,
        scheduler: Scheduler,
        *,
        settle: Settle,
        trace: bool,
    ) -> None:
        self.engine = engine
        self.plan = plan
        self.model = model  # what stays on the device
        self.scheduler = scheduler
        self.order = list(plan.layers)
        self._settle = settle
        self._feed = feed
        self._trace = trace
        self.host: Literal["slabs", "file"] = "file" if isinstance(feed, FileFeed) else "slabs"
        self.resident = {number: model.layers[number] for number in plan.resident}
        self.loop = LoopHandle()
        self.wait_for_arrival = not engine.device.info.needs_stream

    async def last_pass(self) -> PassStats:
        """The last sweep's figures."""
        records = record_pass(self.scheduler.last, self.order)
        await self._settle([event for record in records for event in record.events])
        return await self.engine.callers.run(self._measure, records)

    def _measure(self, records: Sequence[LayerRecord]) -> PassStats:
        """On a thread."""
        self.engine.device.attach()
        stats = measure_pass(records)
        if not self._trace:
            return stats
        if isinstance(self._feed, NativeSlabFeed):
            self.engine.spans.add(self._feed.take_spans())
        stream = self.engine.device.stream()
        try:
            return add_threads(stats, records[0].ready, self.engine.spans, stream)
        finally:
            stream.close()

    def make(self, number: int, ride: Ride, use: Use | None) -> Layer:
        """A layer to hand out."""
        if use is None:
            make = partial(self._views, number)
        else:
            assert use.slot is not None
            make = partial(self._tensors, use.layer, use.slot)
        return Layer(number, self.engine.device, make, scheduler=self.scheduler, ride=ride, use=use)

    def _views(self, number: int) -> Mapping[str, Tensor]:
        return {
            _short(tensor.name, number): Tensor(
                tensor.name,
                shape=tensor.shape,
                logical_shape=tensor.logical_shape,
                dtype=tensor.dtype,
                type=tensor.type,
                device=tensor.device,
                memory=tensor.memory,
            )
            for tensor in self.resident[number]
        }

    def _tensors(self, layer: LayerPlan, slot: Slot) -> Mapping[str, Tensor]:
        return {
            _short(tensor.info.name, layer.number): Tensor(
                tensor.info.name,
                shape=tensor.shape,
                logical_shape=tensor.info.shape,
                dtype=tensor.dtype,
                type=tensor.info.type,
                device=self.engine.device.info,
                memory=slot.allocation,
                offset=offset,
            )
            for tensor, offset in layer.placed
        }


def _short(name: str, layer: int) -> str:
    """A tensor's name within its layer."""
    return name.removeprefix(f"blk.{layer}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRequest:
    """What the caller asked for; ``memory`` are the arguments of ``plan_memory``."""

    path: ModelPath
    dtype: DtypeSpec
    free: int | None
    host: Literal["auto", "slabs", "file"]
    trace: bool
    memory: Mapping[str, Any]


class LayerStream:
    """A model whose layers pass through slots; made by ``Loader.stream``, entered once.

    ``async for layer in stream`` is a sweep: every layer once, in order. The layers that stream are fetched ahead, into
    the slots that are free, also those of the next sweep while this one's last ones are in use.
    """

    def __init__(self, scope: AbstractContextManager[Engine], request: StreamRequest) -> None:
        self._scope = scope
        self._request = request
        self._layers: _Layers | None = None
        self._stack = AsyncExitStack()
        self._entered = False

    async def __aenter__(self) -> Self:
        """Plans, loads what stays on the device, allocates the slots, reads the rest into host memory, and begins."""
        if self._entered:
            raise ClosedError("a layer stream is entered once")
        self._entered = True
        with waiting():
            await self._open()
        return self

    async def _open(self) -> None:
        """What entering the block does."""
        async with AsyncExitStack() as stack:
            engine = stack.enter_context(self._scope)
            if self._request.trace:
                stack.enter_context(engine.spans.watch())
            stack.push_async_callback(engine.callers.run, engine.tracker.flush)
            opened = await stack.enter_async_context(
                OpenedModel(engine.callers.run, strict=engine.options.strict, native=engine.native is not None)
            )
            await opened.open(self._request.path)
            plan = await engine.callers.run(self._plan, engine, opened)
            names = [tensor.info.name for tensor in plan.load.tensors]
            model = await load_model(engine, Request(path=self._request.path, dtype=self._request.dtype, select=names))
            stack.callback(model.close)
            if plan.breakdown["scratch"]:  # of that load, before the layers have theirs
                await engine.callers.run(engine.tracker.flush)
            # In each slot the work on a layer may be waited for, and the next one's arrival; and a pass's end.
            waiters = Threads(2 * plan.slots + 1, "asyncload-layers-wait", nice=engine.options.nice)
            stack.push_async_callback(engine.callers.run, waiters.close)
            slots = _SlotList()
            stack.callback(slots.clear)
            await engine.callers.run(slots.allocate, engine, plan)

            async def settle(events: Sequence[Event]) -> None:
                if events:
                    await waiters.run(_synchronize, engine, events)

            streamed = [plan.layers[number] for number in plan.streamed]
            feed = await self._open_feed(stack, engine, streamed, opened, settle)
            scheduler = Scheduler(
                streamed,
                slots.items,
                feed,
                lambda stream: waiters.run(_record, engine, stream),
                at_once=_READ_AT_ONCE if isinstance(feed, FileFeed) else plan.slots,
                stall_limit=engine.options.stall_limit,
            )
            self._layers = _Layers(engine, plan, model, feed, scheduler, settle=settle, trace=self._request.trace)
            group = anyio.create_task_group()
            await group.__aenter__()
            stack.push_async_exit(partial(_leave, group, scheduler))
            if isinstance(feed, NativeSlabFeed):
                group.start_soon(feed.listen)
            group.start_soon(scheduler.run)
            self._stack = stack.pop_all()

    def _plan(self, engine: Engine, opened: OpenedModel) -> Plan:
        """The memory plan, with its kernels ready; on a thread."""
        free = engine.device.memory().free if self._request.free is None else self._request.free

        def make(options: Options) -> Plan:
            return plan_memory(
                opened.header,
                free=free,
                dtype=self._request.dtype,
                device=engine.device.info.kind,
                options=options,
                **self._request.memory,
            )

        options = engine.backend(opened.sources).options
        plan = make(options)
        if not prepare_kernels(engine, plan.kernels):
            plan = make(replace(options, decode="host"))
            prepare_kernels(engine, plan.kernels)
        plan.load.check_sources([source.size for source in opened.sources])
        return plan

    async def _open_feed(
        self,
        stack: AsyncExitStack,
        engine: Engine,
        layers: Sequence[LayerPlan],
        opened: OpenedModel,
        settle: Settle,
    ) -> FileFeed | SlabFeed | NativeSlabFeed:
        nbytes = sum(layer.upload_nbytes for layer in layers)
        decodes = any(tensor.decode is Decode.DEVICE for layer in layers for tensor, _ in layer.placed)
        host = self._request.host
        made: list[FileFeed | SlabFeed | NativeSlabFeed] = []  # where it is found, also if this is cancelled

        def open_feed() -> None:
            if host == "file" or (host == "auto" and nbytes > _HOST_SHARE * _available_memory()):
                made.append(FileFeed(engine, opened.sources, decodes=decodes))
                return
            slabs, backend = Slabs(engine, layers), engine.backend(opened.sources)
            if isinstance(backend, NativeBackend):
                made.append(NativeSlabFeed(engine, backend, slabs, layers, settle, trace=self._request.trace))
            else:
                made.append(SlabFeed(engine, slabs, settle, decodes=decodes))

        def close() -> None:
            for feed in made:
                feed.close()

        stack.push_async_callback(engine.callers.run, close)
        await engine.callers.run(open_feed)
        feed = made[0]
        if not isinstance(feed, FileFeed):
            await feed.fill(opened.sources)
        return feed

    @property
    def header(self) -> Header:
        """The model's header; inside the ``async with`` block."""
        return self._active().model.header

    @property
    def plan(self) -> Plan:
        """What is where, and what that takes; inside the ``async with`` block."""
        return self._active().plan

    @property
    def host(self) -> Literal["slabs", "file"]:
        """Where the layers that stream come from; inside the ``async with`` block."""
        return self._active().host

    @property
    def resident(self) -> Model:
        """What stays on the device: all that belongs to no layer, and the layers that do not stream."""
        return self._active().model

    def join(self) -> LayerRide:
        """A ride in the next sweep, beside those of other tasks."""
        return LayerRide(self._active())

    async def last_pass(self) -> PassStats:
        """What the last sweep took that a ride has passed to its end and all others have passed or left.

        Waits for its work to end. Raises ``PlanError`` where there is none yet, and where its times are not known, as a
        layer was skipped or used without a stream in that sweep; ``DeviceError`` if its copies or the work failed.
        """
        return await self._active().last_pass()

    def __aiter__(self) -> LayerRide:
        """One sweep."""
        return LayerRide(self._active(), once=True)

    def _active(self) -> _Layers:
        if self._layers is None:
            raise ClosedError("a layer stream is used inside its `async with` block")
        return self._layers

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        """Ends all rides, waits for what is under way on the device, and frees everything.

        Blocks of ``Layer.on`` in other tasks are waited for, ``Options.stall_limit`` seconds at most; what one uses is
        freed when it ends.
        """
        self._layers = None
        with waiting():
            return await self._stack.__aexit__(kind, error, trace)


class _SlotList:
    """The slots; allocated on a thread, found here by whoever ends them."""

    def __init__(self) -> None:
        self.items: list[Slot] = []

    def allocate(self, engine: Engine, plan: Plan) -> None:
        for index in range(plan.slots):
            self.items.append(Slot(index, engine.tracker.allocate(plan.slot_nbytes, Purpose.SLOTS, f"slot {index}")))

    def clear(self) -> None:
        for slot in self.items:
            slot.close()


def _synchronize(engine: Engine, events: Sequence[Event]) -> None:
    engine.device.attach()
    with engine.spans.span("wait"), ExitStack() as stack:  # for all of them, also if one fails
        for event in reversed(events):
            stack.callback(event.synchronize)


def _record(engine: Engine, stream: WorkStream) -> Event:
    engine.device.attach()
    return stream.end()


def _available_memory() -> int:
    """Bytes of host memory that can be had without swapping; 0 where the system does not tell."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text("ascii").splitlines())
        return int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, ValueError, KeyError):
        return 0


async def _leave(group: TaskGroup, scheduler: Scheduler, *_: object) -> None:
    """Ends the rides and the fetching; the body's exception goes on as it is, in no group."""
    try:
        await scheduler.close()
    finally:
        group.cancel_scope.cancel()
        await group.__aexit__(None, None, None)
