"""Passes over all layers, and who is where in them; the scheduler moves them on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import anyio

from asyncload.device import Event, WorkStream
from asyncload.layers._slots import Slot
from asyncload.plan import LayerPlan

__all__ = ["Fed", "Ride", "Sweep", "Use", "Work"]


async def _has_arrived() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Fed:
    """What was enqueued for a layer: events behind all of it.

    ``copies`` gives, by copy stream, the events around each of its copies, of which there may be many.
    ``arrival`` waits until all have passed, and raises ``DeviceError`` if a copy failed.
    """

    arrived: Sequence[Event] = ()
    copies: Callable[[], Sequence[Sequence[tuple[Event, Event]]]] = tuple
    arrival: Callable[[], Awaitable[None]] = _has_arrived


class Work:
    """What the rides do with a layer during one sweep, as events on their streams."""

    def __init__(self) -> None:
        self.ready: Event | None = None  # when the first ride's stream had come to it
        self.began: dict[Ride, Event] = {}  # before each ride's work, behind the layer's arrival; the first's is first
        self.ended: dict[Ride, Event] = {}  # behind it
        self.untimed = False  # some of it was on no stream

    def begin(self, ride: Ride, ready: Event, began: Event) -> None:
        """Keeps a ride's events."""
        self.ready = self.ready or ready
        self.began[ride] = began


class Use(Work):
    """A layer's stay in a slot during one sweep."""

    def __init__(self, layer: LayerPlan, sweep: Sweep) -> None:
        super().__init__()
        self.layer = layer
        self.sweep = sweep
        self.slot: Slot | None = None
        self.fed: Fed = Fed()
        self.fetched = anyio.Event()  # it may be handed out, or nobody fetches it any more
        self.arrived = anyio.Event()  # its copies have ended, however
        self.finished: set[Ride] = set()
        self.inside: dict[Ride, WorkStream | None] = {}  # with the stream that each works on
        self.watched = False
        self.released = anyio.Event()  # all that ended is recorded

    @property
    def keepers(self) -> set[Ride]:
        """The rides for which the slot is kept."""
        return (self.sweep.rides - self.finished) | self.inside.keys()


class Sweep:
    """One pass over all layers, for the rides that had joined when the first of them began."""

    def __init__(self, layers: Sequence[LayerPlan]) -> None:
        self._layers = layers
        self.rides: set[Ride] = set()
        self.started = anyio.Event()
        self.error: BaseException | None = None  # why it cannot be passed any more
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
    number: int = 0  # in the order in which they joined
    position: int = 0
    error: BaseException | None = None  # why it lost its place
    awaited: Use | None = None  # what it waits for
    waiting: anyio.CancelScope | None = None  # ends the wait
