"""What a pass of the layers took, by the device's clock."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from asyncload.device import Event
from asyncload.errors import PlanError
from asyncload.layers._scheduler import Fed, Sweep, Use

__all__ = ["LayerRecord", "LayerTiming", "PassStats", "Span", "lower_bound", "measure_pass", "record_pass"]

Span = tuple[float, float]  # begin and end, in seconds from the pass's begin


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecord:
    """The events that one layer of a sweep left: ``fed`` by its copies, the others by the work on it.

    ``ready`` passed when the stream had come to the layer, ``began`` behind the layer's arrival, ``ended`` behind the
    work. ``slot`` is None for a layer that stays on the device. ``nbytes`` have crossed the bus for it.
    """

    number: int
    slot: int | None = None
    nbytes: int = 0
    fed: Fed = field(default_factory=Fed)
    ready: Event
    began: Event
    ended: Sequence[Event]

    @property
    def events(self) -> list[Event]:
        """All of them."""
        return [*self.fed.begun, *self.fed.arrived, self.ready, self.began, *self.ended]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTiming:
    """One layer of a pass; spans are begin and end in seconds from the pass's begin, durations in seconds.

    ``copies`` has a span for each copy stream (kernels that decode behind the copies belong to it), negative where the
    layer was fetched ahead of the pass; ``work`` runs from the first ride's begin to the last one's end. ``slot`` is
    None, and ``nbytes`` 0, for a layer that stays on the device.

    ``copy`` and ``compute`` are the time that each added: in which this layer was copied, or computed, and none before
    it; ``copy_within`` is the part of ``copy`` after the pass had begun. ``waited`` is how long the first ride's stream
    waited for the layer to arrive.
    """

    number: int
    slot: int | None
    nbytes: int
    copies: tuple[Span, ...]
    work: Span
    copy: float
    copy_within: float
    compute: float
    waited: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PassStats:
    """What one pass of all layers took, in seconds by the device's events, and ``layers`` one by one.

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
        if work.ready is None or work.began is None or not work.ended:
            raise PlanError(f"layer {number} was not used in the last pass")
        use = work if isinstance(work, Use) else None
        if use is not None and not use.fed.begun:
            raise PlanError(f"layer {number} was read from the file: no event says how long its copies took")
        records.append(
            LayerRecord(
                number=number,
                slot=None if use is None or use.slot is None else use.slot.index,
                nbytes=0 if use is None else use.layer.upload_nbytes,
                fed=Fed() if use is None else use.fed,
                ready=work.ready,
                began=work.began,
                ended=tuple(work.ended),
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
    copying, copying_within, computing = _Cover(), _Cover(0.0), _Cover(0.0)
    layers: list[LayerTiming] = []
    for record in records:
        begun = [event.seconds_since(origin) for event in record.fed.begun]
        arrived = [event.seconds_since(origin) for event in record.fed.arrived]
        copies = tuple(zip(begun, arrived, strict=True))
        began = record.began.seconds_since(origin)
        work = began, max(event.seconds_since(origin) for event in record.ended)
        layers.append(
            LayerTiming(
                number=record.number,
                slot=record.slot,
                nbytes=record.nbytes,
                copies=copies,
                work=work,
                copy=copying.add(copies),
                copy_within=copying_within.add(copies),
                compute=computing.add([work]),
                waited=record.began.seconds_since(record.ready),
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
    """Time that spans cover, each moment counted once, to the one that comes first."""

    def __init__(self, until: float = float("-inf")) -> None:
        self._until = until

    def add(self, spans: Iterable[Span]) -> float:
        """What these add to those before; nothing before the latest end so far counts."""
        added = 0.0
        for begin, end in sorted(spans):
            added += max(0.0, end - max(begin, self._until))
            self._until = max(self._until, end)
        return added
