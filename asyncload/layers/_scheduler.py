"""Which layer goes into which slot, and when: uses, sweeps, riders; all of it on the event loop.

A *sweep* passes all layers once. A *use* is a layer's stay in a slot during one sweep. A *ride* is one consumer's way
through the sweeps. A slot is written again once every ride of the sweep has recorded, on its own stream, that its work
on the use has ended; the device waits for these events, the host only for their being recorded (a stream that waits for
an event that was never recorded does not wait). The host is never further ahead than the slots: a layer is handed out
when the work on the layer that had its slot before has ended.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from typing import Final

import anyio
from anyio.abc import TaskGroup

from asyncload.device import Event, Stream
from asyncload.errors import ClosedError, StalledError
from asyncload.layers._slots import Slot
from asyncload.plan import LayerPlan

__all__ = ["Fed", "Feed", "Ride", "Scheduler", "Sweep", "Use", "Work"]

_log: Final = logging.getLogger("asyncload.layers")
_FEEDS: Final = 2  # layers that are fetched at a time: while one arrives, the next is read


@dataclass(frozen=True, slots=True)
class Fed:
    """What was enqueued for a layer: events behind all of it, and, by copy stream, those around each of its copies."""

    arrived: Sequence[Event] = ()
    copies: Sequence[Sequence[tuple[Event, Event]]] = ()


# Enqueues a layer's way into a slot, behind the slot's events, which it replaces by those behind what it enqueued, also
# when it raises.
Feed = Callable[[LayerPlan, Slot], Awaitable[Fed]]


class Work:
    """What the rides do with a layer during one sweep, as events on their streams."""

    def __init__(self) -> None:
        self.ready: Event | None = None  # when the first ride's stream had come to it
        self.began: Event | None = None  # before that ride's work, behind the layer's arrival
        self.ended: list[Event] = []  # behind the rides' work
        self.untimed = False  # some of it was on no stream

    def begin(self, ready: Event, began: Event) -> None:
        """Keeps the first ride's events."""
        if self.began is None:
            self.ready, self.began = ready, began


class Use(Work):
    """A layer's stay in a slot during one sweep."""

    def __init__(self, layer: LayerPlan, sweep: Sweep) -> None:
        super().__init__()
        self.layer = layer
        self.sweep = sweep
        self.slot: Slot | None = None
        self.before: Use | None = None  # the one that had the slot
        self.fed: Fed = Fed()
        self.error: BaseException | None = None
        self.enqueued = anyio.Event()  # its copies are, or it has failed
        self.finished: set[Ride] = set()
        self.inside: dict[Ride, Stream | None] = {}  # with the stream that each works on
        self.watched = False
        self.released = anyio.Event()  # all that ended is recorded
        self.over = anyio.Event()  # and has passed


class Sweep:
    """One pass over all layers, for the rides that had joined when the first of them began."""

    def __init__(self, layers: Sequence[LayerPlan]) -> None:
        self._layers = layers
        self.rides: set[Ride] = set()
        self.started = anyio.Event()
        self.failed = False
        self.passed = False  # by at least one ride, to its end
        self.uses = [Use(layer, self) for layer in layers]
        self.resident: defaultdict[int, Work] = defaultdict(Work)  # on layers that are in no slot, by number

    @cached_property
    def next(self) -> Sweep:
        """The one after it."""
        return Sweep(self._layers)

    @property
    def abandoned(self) -> bool:
        """Whether nobody is left in it."""
        return self.started.is_set() and not self.rides


@dataclass(eq=False, slots=True)
class Ride:
    """A consumer's place: its sweep, and how many of the sweep's layers it has been given."""

    sweep: Sweep
    position: int = 0
    error: BaseException | None = None  # why it lost its place


class Scheduler:
    """Brings layers into slots, sweep after sweep, ahead of the rides; ``run`` is its one task.

    ``settle`` waits for events, ``record`` records one, both off the loop. A ride that has not finished a use
    ``stall_limit`` seconds after another has loses its place with ``StalledError``.
    """

    def __init__(
        self,
        layers: Sequence[LayerPlan],
        slots: Sequence[Slot],
        feed: Feed,
        settle: Callable[[Sequence[Event]], Awaitable[None]],
        record: Callable[[Stream], Awaitable[Event]],
        *,
        stall_limit: float,
    ) -> None:
        self._layers = layers
        self._slots = slots
        self._feed = feed
        self.settle = settle
        self._record = record
        self._rides: set[Ride] = set()
        self._feeding = anyio.Semaphore(_FEEDS)
        self._stall_limit = stall_limit
        self._last: dict[Slot, Use] = {}
        self._next = Sweep(layers)  # that rides can join
        self._begin: Sweep | None = self._next  # where ``run`` begins
        self._group: TaskGroup | None = None
        self._closed = False
        self.last: Sweep | None = None  # that was passed to its end and that all rides have left

    # The task

    async def run(self) -> None:
        """Fetches layers until it is cancelled."""
        slots, sweep, self._begin = cycle(self._slots), self._begin, None
        assert sweep is not None
        async with anyio.create_task_group() as group:
            self._group = group
            try:
                while True:
                    await self._fetch(sweep, slots)
                    await sweep.started.wait()
                    failed, sweep = sweep.failed, sweep.next
                    if failed:  # not again before somebody asks
                        await sweep.started.wait()
            finally:
                self._group = None

    async def _fetch(self, sweep: Sweep, slots: Iterator[Slot]) -> None:
        """Has a sweep's layers fetched, in order, as long as there is somebody for whom."""
        for use in sweep.uses:
            slot = next(slots)
            before = self._last.get(slot)
            if before is not None:
                await before.released.wait()
            await self._feeding.acquire()
            if sweep.abandoned or sweep.failed:
                self._feeding.release()
                break
            use.slot, use.before = slot, before
            self._last[slot] = use
            self._start(self._feed_use, use)

    async def _feed_use(self, use: Use) -> None:
        assert use.slot is not None
        try:
            use.fed = await self._feed(use.layer, use.slot)
        except Exception as error:  # noqa: BLE001 - the rides raise it
            use.error = error
            use.sweep.failed = True
            for later in use.sweep.uses:  # that nobody fetches any more
                if later.slot is None:
                    later.error = error
                    later.enqueued.set()
        finally:
            self._feeding.release()
            use.enqueued.set()
        self._check(use)

    def _check(self, use: Use) -> None:
        """Releases a use that nobody will use any more."""
        if use.released.is_set() or use.slot is None or not use.enqueued.is_set() or not use.sweep.started.is_set():
            return
        waited_for = (use.sweep.rides - use.finished) | use.inside.keys()
        if not waited_for:
            use.slot.busy = [*use.slot.busy, *use.ended]
            use.released.set()
            self._start(self._await_end, use)
        elif use.finished and not use.watched:
            use.watched = True
            self._start(self._watch, use)

    def _start(self, function: Callable[[Use], Coroutine[object, object, None]], use: Use) -> None:
        if self._group is not None and not self._closed:
            self._group.start_soon(function, use)

    async def _await_end(self, use: Use) -> None:
        """Lets the use of the slot after this one be handed out once the work on this one has ended, however.

        A use that was never handed out ends with the one before it.
        """
        if use.before is not None:
            await use.before.over.wait()
        try:
            await self.settle(use.ended)
        except Exception as error:  # noqa: BLE001 - it is the consumer's, whose own stream reports it
            _log.warning("work on layer %d failed: %s", use.layer.number, error)
        use.over.set()
        use.before = None

    async def _watch(self, use: Use) -> None:
        """Leaves those behind that have not finished a use in time after another ride has."""
        with anyio.move_on_after(self._stall_limit):
            await use.released.wait()
            return
        for ride in (use.sweep.rides - use.finished) | use.inside.keys():
            limit = f"{self._stall_limit:g} seconds"
            error = StalledError(f"layer {use.layer.number} was kept for {limit} after another had finished with it")
            await self._leave_behind(ride, use, error)

    async def _leave_behind(self, ride: Ride, use: Use, error: StalledError) -> None:
        """Takes a ride's place; what it has enqueued until now is still waited for."""
        if (stream := use.inside.get(ride)) is not None:
            ended = await self._record(stream)
            if use.inside.pop(ride, None) is not None:
                use.ended.append(ended)
        self.leave(ride, error)
        self._check(use)  # the ride may have left before, for another layer that it kept

    # The rides: on the event loop, from any task

    def join(self) -> Ride:
        """Takes a place in the next sweep, and in those after it."""
        self._check_open()
        ride = Ride(self._next)
        ride.sweep.rides.add(ride)
        self._rides.add(ride)
        return ride

    async def step(self, ride: Ride, *, arrived: bool = False) -> Use | None:
        """The use of the ride's next layer, once its copies are enqueued and the use before it in the slot is over.

        ``arrived`` waits for the copies' end, too. None at the end of the sweep; the ride is in the next one then.
        Raises what fetching the layer has raised, ``StalledError`` for a ride that was left behind, ``ClosedError``
        after the end. Where it is cancelled, the next step gives the same layer.
        """
        self.check(ride)
        if not ride.sweep.started.is_set():
            self._start_sweep(ride.sweep)
        if ride.position == len(ride.sweep.uses):
            ride.sweep.passed = True
            self._change(ride)
            return None
        use = ride.sweep.uses[ride.position]
        await use.enqueued.wait()
        if use.error is None and use.before is not None:
            await use.before.over.wait()
        if use.error is None and arrived:
            await self._await_arrival(use)
        self.check(ride)
        if use.error is not None:
            self._change(ride)
            raise use.error
        ride.position += 1
        return use

    async def _await_arrival(self, use: Use) -> None:
        try:
            await self.settle(use.fed.arrived)
        except Exception as error:  # noqa: BLE001 - the rides raise it
            use.error = use.error or error

    def enter(self, ride: Ride, use: Use, stream: Stream | None) -> None:
        """A ride begins to use a layer on a stream, or on the host."""
        self.check(ride)
        if ride in use.finished or ride in use.inside or use.released.is_set():
            raise ClosedError(f"layer {use.layer.number} has been used")
        use.inside[ride] = stream

    def finish(self, ride: Ride, use: Use, ended: Event | None = None) -> None:
        """A ride's work on a use has been enqueued, with an event behind it; or it does none."""
        use.finished.add(ride)
        if use.inside.pop(ride, None) is not None and ended is not None:
            use.ended.append(ended)
        self._check(use)

    def leave(self, ride: Ride, error: BaseException | None = None) -> None:
        """A ride gives its place up, or loses it; a use that it is inside of stays its until it has finished that."""
        if ride.error is None:
            ride.error = error or ClosedError("this ride has ended")
        self._rides.discard(ride)
        self._withdraw(ride, sweep := ride.sweep)
        while sweep.started.is_set():  # rides that are ahead of this one may have begun later ones, with it
            self._withdraw(ride, sweep := sweep.next)
        ride.sweep = Sweep(())  # a sweep holds those after it: who keeps the ride keeps none

    def close(self) -> None:
        """Ends all rides; what waits in them is woken."""
        self._closed = True
        for ride in list(self._rides):
            for use in ride.sweep.uses:
                use.error = use.error or ClosedError("the layer stream has been closed")
                use.enqueued.set()
                if use.before is not None:
                    use.before.over.set()
            self.leave(ride, ClosedError("the layer stream has been closed"))

    def _start_sweep(self, sweep: Sweep) -> None:
        sweep.started.set()
        sweep.next.rides |= sweep.rides  # they ride on together
        self._next = sweep.next

    def _change(self, ride: Ride) -> None:
        """From a sweep to the next one."""
        old, ride.sweep, ride.position = ride.sweep, ride.sweep.next, 0
        self._withdraw(ride, old)

    def _withdraw(self, ride: Ride, sweep: Sweep) -> None:
        sweep.rides.discard(ride)
        if sweep.passed and not sweep.rides:
            self.last = sweep
        for use in sweep.uses:
            self._check(use)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the layer stream has been closed")

    def check(self, ride: Ride) -> None:
        """Raises why a ride has no place any more, if it has none."""
        if ride.error is not None:
            raise ride.error
        self._check_open()
