"""Passes as a trace that Perfetto and Chrome's tracing page show."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from asyncload.layers._stats import LayerTiming, PassStats

__all__ = ["trace", "write_trace"]

_MICROSECONDS: Final = 1e6


def trace(passes: Sequence[PassStats]) -> dict[str, Any]:
    """Passes as an object of the Trace Event Format, JSON's types only: a process for each pass, all beginning at once.

    Its rows (threads) are the copy streams, the compute (of each ride, if there are several) and the slots, each with
    the layers that were in it, and the loader's threads where their spans were noted: a slot is taken from its first
    copy's begin to the end of the work.
    Times are microseconds from whatever began first, ahead of any pass. Source: the document "Trace Event Format" of
    the Chromium project (complete events ``X``, metadata events ``M``).
    """
    origin = min([0.0, *(bar.begin for stats in passes for _, bars in _rows(stats) for bar in bars)])
    events: list[dict[str, Any]] = []
    for process, stats in enumerate(passes):
        events.append(_name("process", f"pass {process}", process))
        for row, (name, bars) in enumerate(_rows(stats)):
            events += (_name("thread", name, process, row), _order(process, row))
            for bar in bars:
                events.append(
                    {
                        "ph": "X",
                        "name": bar.name,
                        "cat": name,
                        "pid": process,
                        "tid": row,
                        "ts": (bar.begin - origin) * _MICROSECONDS,
                        "dur": (bar.end - bar.begin) * _MICROSECONDS,
                        "args": bar.details,
                    }
                )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_trace(path: str | Path, passes: Sequence[PassStats]) -> None:
    """Writes ``trace(passes)`` as a JSON file, for https://ui.perfetto.dev or ``chrome://tracing``; blocks."""
    Path(path).write_text(json.dumps(trace(passes)), "utf-8")


class _Bar(NamedTuple):
    """Something that a row shows; times in seconds from the pass's begin."""

    name: str
    begin: float
    end: float
    details: dict[str, Any]


def _rows(stats: PassStats) -> Iterator[tuple[str, list[_Bar]]]:
    layers = stats.layers
    for stream in range(max((len(layer.copies) for layer in layers), default=0)):
        copies = ((layer, span) for layer in layers if layer.copies for span in layer.copies[stream])
        yield f"copy stream {stream}", [_bar(layer, *span) for layer, span in copies]
    rides = sorted({ride for layer in layers for ride in layer.rides})
    if len(rides) > 1:
        for row, ride in enumerate(rides):
            yield f"compute, ride {row}", [_bar(layer, *layer.rides[ride]) for layer in layers if ride in layer.rides]
    else:
        yield "compute", [_bar(layer, layer.work[1] - layer.compute, layer.work[1]) for layer in layers]
    for slot in sorted({layer.slot for layer in layers if layer.slot is not None}):
        yield f"slot {slot}", [_bar(layer, layer.entered, layer.work[1]) for layer in layers if layer.slot == slot]
    for thread in sorted({span.thread for span in stats.threads}):
        spans = (span for span in stats.threads if span.thread == thread)
        yield f"thread {thread}", [_Bar(span.what, span.begin, span.end, {}) for span in spans]


def _bar(layer: LayerTiming, begin: float, end: float) -> _Bar:
    return _Bar(f"layer {layer.number}", begin, end, {"nbytes": layer.nbytes, "waited": layer.waited})


def _name(kind: str, name: str, process: int, row: int = 0) -> dict[str, Any]:
    return {"ph": "M", "name": f"{kind}_name", "pid": process, "tid": row, "args": {"name": name}}


def _order(process: int, row: int) -> dict[str, Any]:
    return {"ph": "M", "name": "thread_sort_index", "pid": process, "tid": row, "args": {"sort_index": row}}
