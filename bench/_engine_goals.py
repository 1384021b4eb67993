"""What is wanted of the native engine, and whether it is so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from asyncload.options import DeviceKind
from bench._peers import INSTANTTENSOR
from bench._race import Line, Race
from bench.load import Row

__all__ = ["NATIVE", "PYTHON", "Goal", "fastest", "goals_of_decoding", "goals_of_loads", "goals_of_ticker"]

NATIVE: Final = "asyncload, native"
PYTHON: Final = "asyncload, python"

_LEAST_OF_LIMIT: Final[Mapping[DeviceKind, float]] = {"cuda": 0.93, "host": 0.90}
_LEAST_OF_IDLE: Final = {1: 0.9, 4: 0.8}  # by how many threads spin
_LEAST_OF_INSTANTTENSOR: Final = {0: 1.15, 1: 5.0}
_MOST_OF_PACKED: Final = 1.1
_MACHINE: Final = {"idle", "bare reads"}  # what a ticker is late by without a load
_MOST_LATE: Final = {0: 4.0, 10: 2.0}  # milliseconds, by the niceness of the engine's threads


@dataclass(frozen=True, slots=True)
class Goal:
    """What is wanted, what was measured of it, and whether that is enough."""

    goal: str
    value: float
    met: bool

    def __str__(self) -> str:
        """Says it on a line."""
        return f"{'met' if self.met else 'NOT met'} ({self.value:.3f}): {self.goal}"


def fastest(lines: Sequence[Line], loader: str, spinning: int) -> Line | None:
    """The fastest line of the loaders whose names begin so, beside so many spinning threads."""
    found = [line for line in lines if line.loader.startswith(loader) and line.spinning == spinning]
    return max(found, key=lambda line: line.rate, default=None)


def goals_of_loads(race: Race, kind: DeviceKind) -> Iterator[Goal]:
    """Of packed loads: their share of the limit, and of their own idle rate, and InstantTensor's best beside them."""
    idle = fastest(race.lines, NATIVE, 0)
    if idle is None:
        return
    least, value = _LEAST_OF_LIMIT[kind], idle.rate / race.limit_rate
    yield Goal(f"{_at(idle)}: at least {least} of the limit", value, value >= least)
    for spinning, least in _LEAST_OF_IDLE.items():
        if (busy := fastest(race.lines, NATIVE, spinning)) is not None:
            value = busy.rate / idle.rate
            yield Goal(f"{_at(busy)}: at least {least} of its own idle rate", value, value >= least)
    for spinning, least in _LEAST_OF_INSTANTTENSOR.items():
        ours, best = (fastest(race.lines, loader, spinning) for loader in (NATIVE, INSTANTTENSOR))
        if ours is not None and best is not None:
            value = ours.rate / best.rate
            yield Goal(f"{_at(ours)}: at least {least} times {best.loader}'s rate", value, value >= least)


def goals_of_decoding(packed: Row, decoded: Row) -> Iterator[Goal]:
    """Of a load that decodes on the device, against one that does not."""
    value = decoded.seconds / packed.seconds
    yield Goal(f"Q4_K_M to bfloat16: at most {_MOST_OF_PACKED} of the packed time", value, value <= _MOST_OF_PACKED)


def goals_of_ticker(nice: int, rows: Mapping[str, Any]) -> Iterator[Goal]:
    """Of the lateness of a ticker beside loads by threads of a niceness."""
    if nice in _MOST_LATE:
        most = _MOST_LATE[nice]
        value = max(row["milliseconds"]["p99.9"] for name, row in rows.items() if name not in _MACHINE)
        yield Goal(f"a ticker beside loads, nice {nice}: late by at most {most} ms at p99.9", value, value <= most)


def _at(line: Line) -> str:
    beside = {0: "idle", 1: "one thread spinning"}.get(line.spinning, f"{line.spinning} threads spinning")
    return f"{line.nbytes / 1e9:.1f} GB, {beside}"
