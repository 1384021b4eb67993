"""Which layer goes into which slot, and when: uses, sweeps, riders; all of it on the event loop.

A *sweep* passes all layers once. A *use* is a layer's stay in a slot during one sweep. A *ride* is one consumer's way
through the sweeps. A slot is written again once every ride of the sweep has recorded, on its own stream, that its work
on the use has ended; the device waits for these events, the host only for their being recorded (a stream that waits for
an event that was never recorded does not wait). The host is never further ahead than the slots: a layer is handed out
when the work on the layer that had its slot before has ended.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import cycle
from typing import Final

import anyio
from anyio.abc import TaskGroup

from asyncload.device import Event, WorkStream
from asyncload.errors import ClosedError, DeviceError, StalledError
from asyncload.layers._slots import Slot
from asyncload.layers._sweep import Fed, Ride, Sweep, Use, Work
from asyncload.plan import LayerPlan

__all__ = ["Scheduler"]

_log: Final = logging.getLogger("asyncload.layers")

# Enqueues a layer's way into a slot, behind the slot's events, which it replaces by those behind what it enqueued, also
# when it raises. Returns when the work before the former has ended, however.
Feed = Callable[[LayerPlan, Slot], Awaitable[Fed]]


class Scheduler:
    """Brings layers into slots, sweep after sweep, ahead of the rides; ``run`` is its one task.

    ``feed`` is given up to ``at_once`` layers at a time; ``record`` records an event, off the loop. A ride that keeps a
    use for ``stall_limit`` seconds while any ride waits for its slot loses its place with ``StalledError``.
    """

    def __init__(
        self,
        layers: Sequence[LayerPlan],
        slots: Sequence[Slot],
        feed: Feed,
        record: Callable[[WorkStream], Awaitable[Event]],
        *,
        at_once: int,
        stall_limit: float,
    ) -> None:
        self._layers = layers
        self._slots = slots
        self._feed = feed
        self._record = record
        self._rides: set[Ride] = set()
        self._joined = 0  # rides, ever
        self._feeding = anyio.Semaphore(at_once)
        self._stall_limit = stall_limit
        self._last: dict[Slot, Use] = {}
        self._kept: Use | None = None  # whose slot is to be filled next
        self._blocks: set[tuple[Ride, Work]] = set()  # that rides are inside of
        self._vacant = anyio.Event()  # after the end there is none
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
                    await self._fetch(sweep, slots, group)
                    await sweep.started.wait()
                    failed, sweep = sweep.error, sweep.next
                    if failed is not None:  # not again before somebody asks
                        await sweep.started.wait()
            finally:
                self._group = None

    async def _fetch(self, sweep: Sweep, slots: Iterator[Slot], group: TaskGroup) -> None:
        """Has a sweep's layers fetched, in order, as long as there is somebody for whom."""
        for use in sweep.uses:
            slot = next(slots)
            before = self._last.get(slot)
            if before is not None and not before.released.is_set():
                self._kept = before
                self._watch_kept()
                await before.released.wait()
                self._kept = None
            await self._feeding.acquire()
            if sweep.abandoned or sweep.error is not None:
                self._feeding.release()
                break
            use.slot = slot
            self._last[slot] = use
            group.start_soon(self._feed_use, use, before)

    async def _feed_use(self, use: Use, before: Use | None) -> None:
        assert use.slot is not None
        try:
            use.fed = await self._feed(use.layer, use.slot)
            # Its copies have ended, already or when waited for: if one failed, nobody is given more than the slots had.
            if before is not None and not before.arrived.is_set():
                await before.arrived.wait()
        except Exception as error:  # noqa: BLE001 - the rides raise it
            self._fail(use, error)
        finally:
            self._feeding.release()
            use.fetched.set()
        self._check(use)
        try:
            await use.fed.arrival()
        except Exception as error:  # noqa: BLE001 - as above
            self._fail(use, error)
        use.arrived.set()

    @staticmethod
    def _fail(failed: Use, error: Exception) -> None:
        """Has the rides of a sweep raise the error of one of its uses at their next step."""
        if isinstance(error, DeviceError) and error.layer is None:
            error.layer = failed.layer.number
            if error.tensor is None and (tensors := failed.layer.load.tensors):  # of no chunk: all of it was to move
                error.tensor, error.offset = tensors[0].info.name, tensors[0].info.offset
        failed.sweep.error = failed.sweep.error or error
        for use in failed.sweep.uses:
            if use.slot is None:
                use.fetched.set()

    def _check(self, use: Use) -> None:
        """Releases a use that nobody will use any more."""
        if use.released.is_set() or use.slot is None or not use.fetched.is_set() or not use.sweep.started.is_set():
            return
        if not use.keepers:
            use.slot.busy = [*use.slot.busy, *use.ended.values()]
            use.released.set()

    def _watch_kept(self) -> None:
        """Has the use watched whose slot is to be filled next, if there is a ride for whom."""
        use = self._kept
        if use is not None and self._group is not None and not use.watched and self._starved:
            use.watched = True
            self._group.start_soon(self._watch, use)

    @property
    def _starved(self) -> bool:
        """Whether a ride waits for a layer that is not being fetched."""
        return any(ride.awaited is not None and ride.awaited.slot is None for ride in self._rides)

    async def _watch(self, use: Use) -> None:
        """Leaves those behind that have not finished a use in time."""
        with anyio.move_on_after(self._stall_limit):
            await use.released.wait()
            return
        use.watched = False
        if self._starved:
            for ride in use.keepers:
                await self._leave_behind(ride, use)

    async def _leave_behind(self, ride: Ride, use: Use) -> None:
        """Takes a ride's place; what it has enqueued until now is still waited for."""
        if ride not in use.keepers:  # any more
            return
        if (stream := use.inside.get(ride)) is not None:
            try:
                ended = await self._record(stream)
            except Exception as failure:  # noqa: BLE001 - nothing says when its work has ended, but the block's end
                _log.warning("work on layer %d cannot be waited for: %s", use.layer.number, failure)
            else:
                if use.inside.pop(ride, None) is not None:
                    use.ended[ride] = ended
        limit = f"{self._stall_limit:g} seconds"
        message = f"layer {use.layer.number} was kept for {limit} while a ride waited for its slot"
        self.leave(ride, StalledError(message))
        self._check(use)  # the ride may have left before, for another layer that it kept

    # The rides: on the event loop, from any task

    def join(self) -> Ride:
        """Takes a place in the next sweep, and in those after it."""
        self._check_open()
        ride = Ride(self._next, self._joined)
        self._joined += 1
        ride.sweep.rides.add(ride)
        self._rides.add(ride)
        return ride

    async def step(self, ride: Ride, *, arrived: bool = False) -> Use | None:
        """The use of the ride's next layer, once its copies are enqueued and the work before it in the slot has ended.

        ``arrived`` waits for the copies' end, too. None at the end of the sweep, when all its copies have ended; the
        ride is in the next one then. Raises what fetching any of the sweep's layers has raised, ``StalledError`` for a
        ride that was left behind, ``ClosedError`` after the end. Where it is cancelled, the next step gives the same
        layer.
        """
        self.check(ride)
        sweep, use = ride.sweep, None
        if not sweep.started.is_set():
            self._start_sweep(sweep)
        if ride.position < len(sweep.uses):
            use = sweep.uses[ride.position]
        scope = ride.waiting = anyio.CancelScope()  # which the ride's end cancels
        try:
            with scope:
                if use is None:
                    await self._await_arrivals(sweep)
                else:
                    await self._await_use(ride, use, arrived=arrived)
        finally:
            ride.waiting = ride.awaited = None
        self.check_sweep(ride)
        if use is None:
            sweep.passed = True
            self._change(ride)
        else:
            ride.position += 1
        return use

    async def _await_use(self, ride: Ride, use: Use, *, arrived: bool) -> None:
        if not use.fetched.is_set():
            ride.awaited = use
            self._watch_kept()
            await use.fetched.wait()
        if arrived and use.sweep.error is None and not use.arrived.is_set():
            await use.arrived.wait()

    async def _await_arrivals(self, sweep: Sweep) -> None:
        for use in sweep.uses:
            if sweep.error is None and not use.arrived.is_set():
                await use.arrived.wait()

    def enter(self, ride: Ride, work: Work, stream: WorkStream | None) -> None:
        """A ride begins to use a layer on a stream, or on the host."""
        self.check(ride)
        if isinstance(work, Use):
            if ride in work.finished or ride in work.inside or work.released.is_set():
                raise ClosedError(f"layer {work.layer.number} has been used")
            work.inside[ride] = stream
        self._blocks.add((ride, work))

    def finish(self, ride: Ride, work: Work, ended: Event | None = None) -> None:
        """A ride's work on a layer has been enqueued, with an event behind it; or it does none."""
        if isinstance(work, Use):
            work.finished.add(ride)
            if work.inside.pop(ride, None) is None:
                ended = None  # the ride was left behind, and an event recorded then
        if ended is not None:
            work.ended[ride] = ended
        if isinstance(work, Use):
            self._check(work)
        self._blocks.discard((ride, work))
        if self._closed and not self._blocks:
            self._vacant.set()

    def leave(self, ride: Ride, error: BaseException | None = None) -> None:
        """A ride gives its place up, or loses it; a use that it is inside of stays its until it has finished that."""
        if ride.error is None:
            ride.error = error or ClosedError("this ride has ended")
        if ride.waiting is not None:
            ride.waiting.cancel()
        self._rides.discard(ride)
        self._withdraw(ride, sweep := ride.sweep)
        while sweep.started.is_set():  # rides that are ahead of this one may have begun later ones, with it
            self._withdraw(ride, sweep := sweep.next)
        ride.sweep = Sweep(())  # a sweep holds those after it: who keeps the ride keeps none

    async def close(self) -> None:
        """Ends all rides, waking those that wait, and waits for the blocks that they are inside of.

        It waits for ``stall_limit`` seconds at most: what such a block uses is held until it ends.
        """
        self._closed = True
        for ride in list(self._rides):
            self.leave(ride, ClosedError("the layer stream has been closed"))
        if self._blocks:
            with anyio.move_on_after(self._stall_limit):
                await self._vacant.wait()
        if self._blocks:
            _log.warning("a layer stream was closed while %d blocks used its layers", len(self._blocks))

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

    def check_sweep(self, ride: Ride) -> None:
        """Raises also why a ride's sweep cannot be passed any more; the ride is in the next one then."""
        self.check(ride)
        if (error := ride.sweep.error) is not None:
            self._change(ride)
            try:
                raise error
            finally:
                del error  # it refers to this frame
