"""What a pass of the layers took, by the device's clock."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from asyncload.device import Event
from asyncload.errors import PlanError
from asyncload.layers._sweep import Sweep, Use
from asyncload.pipeline import ThreadSpan

__all__ = ["LayerRecord", "LayerTiming", "PassStats", "Span", "lower_bound", "measure_pass", "record_pass"]

Span = tuple[float, float]  # begin and end, in seconds from the pass's begin


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecord:
    """The events that one layer of a sweep left: by copy stream those around its copies, and those of the work on it.

    ``ready`` passed when the stream had come to the layer, ``began`` behind the layer's arrival, ``ended`` behind the
    work; ``rides`` has the latter two for each ride, by its number. ``slot`` is None for a layer that stays on the
    device. ``nbytes`` have crossed the bus for it.
    """

    number: int
    slot: int | None = None
    nbytes: int = 0
    copies: Sequence[Sequence[tuple[Event, Event]]] = ()
    ready: Event
    began: Event
    ended: Sequence[Event]
    rides: Mapping[int, tuple[Event, Event]] = field(default_factory=dict[int, tuple[Event, Event]])

    @property
    def events(self) -> list[Event]:
        """All of them."""
        around = chain.from_iterable(chain.from_iterable(self.copies))
        return [*around, self.ready, self.began, *self.ended]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTiming:
    """One layer of a pass; spans are begin and end in seconds from the pass's begin, durations in seconds.

    ``copies`` has, for each copy stream, the spans of the layer's copies (kernels that decode behind them belong to
    these): one where it comes from host memory, one for each chunk where it comes from the file. They are negative
    where the layer was fetched ahead of the pass. ``work`` runs from the first ride's begin to the last one's end;
    ``rides`` has each ride's own, by its number.
    ``slot`` is None, and ``nbytes`` 0, for a layer that stays on the device.

    ``copy`` and ``compute`` are the time that each added: in which this layer was copied, or computed, and none before
    it; ``copy_within`` is the part of ``copy`` after the pass had begun. ``waited`` is how long the first ride's stream
    waited for the layer to arrive.
    """

    number: int
    slot: int | None
    nbytes: int
    copies: tuple[tuple[Span, ...], ...]
    work: Span
    copy: float
    copy_within: float
    compute: float
    waited: float
    rides: Mapping[int, Span] = field(default_factory=dict[int, Span])

    @property
    def entered(self) -> float:
        """When its first copy began, or, where it had none, the work."""
        return min((begin for stream in self.copies for begin, _ in stream), default=self.work[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class PassStats:
    """What one pass of all layers took, in seconds by the device's events, and ``layers`` one by one.

    ``threads`` is what the loader's threads did meanwhile, in seconds from the pass's begin, where that is noted.

    A pass begins when its first layer's copies are enqueued and the first ride's stream has nothing else to do than to
    wait for them; it ends with the work on the layers. ``wall`` is the time between: not the time between two passes,
    and not what was copied ahead of the pass. ``copy`` is the time in which any of its layers was copied, ahead or not,
    ``compute`` the time in which any was worked on.

    ``lower_bound`` is that of the pass with as many slots as layers, from its copies' part within the pass and its
    compute time: no order of the same copies and work takes less.
    """

    wall: float
    copy: float
    compute: float
    lower_bound: float
    nbytes: int
    layers: tuple[LayerTiming, ...]
    threads: tuple[ThreadSpan, ...] = ()

    @property
    def earliest(self) -> float:
        """When the first copy began, or the pass; 0 at the most."""
        return min([0.0, *(layer.entered for layer in self.layers)])

    @property
    def exposed_stall(self) -> float:
        """The share of the copy time that compute did not hide: (wall - compute) / copy; 0 where nothing was copied."""
        return (self.wall - self.compute) / self.copy if self.copy > 0 else 0.0

    @property
    def scheduling_stall(self) -> float:
        """Seconds that the pass took above its lower bound: for want of slots, or of a host that is fast enough."""
        return self.wall - self.lower_bound

    @property
    def rate(self) -> float:
        """Bytes that crossed the bus in a second of copy time; 0 where nothing was copied."""
        return self.nbytes / self.copy if self.copy > 0 else 0.0

    def share_of(self, link_bytes_per_second: float) -> float:
        """The rate as a share of what the link gives by itself, measured by the caller with the same kind of memory.

        Raises ``PlanError`` unless that is above 0.
        """
        if not link_bytes_per_second > 0:
            raise PlanError(f"a link moves {link_bytes_per_second} bytes a second: it must be more than 0")
        return self.rate / link_bytes_per_second


def lower_bound(copies: Sequence[float], computes: Sequence[float]) -> float:
    """The least time of a pass over one copy queue and one compute queue, from each layer's times, in order.

    All copies, then the last layer's compute; or the first one's copy, then all compute: whichever is longer. That is
    max(sum(T) + C_last, T_first + sum(C)); it is reached with as many slots as layers where all take the same.
    """
    if not copies:
        return 0.0
    return max(sum(copies) + computes[-1], copies[0] + sum(computes))


def record_pass(sweep: Sweep | None, order: Iterable[int]) -> list[LayerRecord]:
    """Takes the events of a sweep's layers; raises ``PlanError`` as ``LayerStream.last_pass`` says."""
    if sweep is None:
        raise PlanError("no ride has passed all layers yet")
    uses = {use.layer.number: use for use in sweep.uses}
    records: list[LayerRecord] = []
    for number in order:
        work = uses.get(number) or sweep.resident[number]
        if work.untimed:
            raise PlanError(f"layer {number} was used without a stream: no event says how long that took")
        if work.ready is None or not work.began or not work.ended:
            raise PlanError(f"layer {number} was not used in the last pass")
        use = work if isinstance(work, Use) else None
        records.append(
            LayerRecord(
                number=number,
                slot=None if use is None or use.slot is None else use.slot.index,
                nbytes=0 if use is None else use.layer.upload_nbytes,
                copies=() if use is None else use.fed.copies(),
                ready=work.ready,
                began=next(iter(work.began.values())),
                ended=tuple(work.ended.values()),
                rides={
                    ride.number: (began, work.ended[ride]) for ride, began in work.began.items() if ride in work.ended
                },
            )
        )
    return records


def measure_pass(records: Sequence[LayerRecord]) -> PassStats:
    """Reads the times between a pass's events, all of which have passed; asks the driver, so it blocks.

    Raises ``DeviceError`` for events that have not passed or were recorded without timing, ``PlanError`` for no layers.
    """
    if not records:
        raise PlanError("a pass of no layers takes no time")
    origin = records[0].ready
    copying, copying_within, computing = _Cover(), _Cover(since=0.0), _Cover()
    layers: list[LayerTiming] = []
    for record in records:
        copies = tuple(
            tuple((begun.seconds_since(origin), arrived.seconds_since(origin)) for begun, arrived in stream)
            for stream in record.copies
        )
        began = record.began.seconds_since(origin)
        work = began, max(event.seconds_since(origin) for event in record.ended)
        layers.append(
            LayerTiming(
                number=record.number,
                slot=record.slot,
                nbytes=record.nbytes,
                copies=copies,
                work=work,
                copy=copying.add(chain.from_iterable(copies)),
                copy_within=copying_within.add(chain.from_iterable(copies)),
                compute=computing.add([work]),
                waited=record.began.seconds_since(record.ready),
                rides={
                    ride: (begun.seconds_since(origin), ended.seconds_since(origin))
                    for ride, (begun, ended) in record.rides.items()
                },
            )
        )
    return PassStats(
        wall=max(layer.work[1] for layer in layers),
        copy=sum(layer.copy for layer in layers),
        compute=sum(layer.compute for layer in layers),
        lower_bound=lower_bound([layer.copy_within for layer in layers], [layer.compute for layer in layers]),
        nbytes=sum(layer.nbytes for layer in layers),
        layers=tuple(layers),
    )


class _Cover:
    """Time that spans cover, each moment counted once, to whom it is added first; none before ``since``."""

    def __init__(self, since: float = float("-inf")) -> None:
        self._covered: list[Span] = [(float("-inf"), since)]  # in order, and apart

    def add(self, spans: Iterable[Span]) -> float:
        """What these add to those before."""
        added = 0.0
        for begin, end in spans:
            first = bisect_left(self._covered, begin, key=lambda span: span[1])
            last = bisect_right(self._covered, end, key=lambda span: span[0])
            touched = self._covered[first:last]
            added += end - begin - sum(min(end, until) - max(begin, since) for since, until in touched)
            touched.append((begin, end))
            self._covered[first:last] = [(min(since for since, _ in touched), max(until for _, until in touched))]
        return max(0.0, added)
