"""Passes as a trace that Perfetto and Chrome's tracing page show."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from asyncload.layers._stats import LayerTiming, PassStats, Span

__all__ = ["trace", "write_trace"]

_MICROSECONDS: Final = 1e6


def trace(passes: Sequence[PassStats]) -> dict[str, Any]:
    """Passes as an object of the Trace Event Format, JSON's types only: a process for each pass, all beginning at once.

    Its rows (threads) are the copy streams, the compute, and the slots, each with the layers that were in it: a slot is
    taken from its first copy's begin to the end of the work. Times are microseconds from the first copy that was made
    ahead of any pass. Source: the document "Trace Event Format" of the Chromium project (complete events ``X``,
    metadata events ``M``).
    """
    origin = min([0.0, *(_begin(layer) for stats in passes for layer in stats.layers)])
    events: list[dict[str, Any]] = []
    for process, stats in enumerate(passes):
        events.append(_name("process", f"pass {process}", process))
        for row, (name, spans) in enumerate(_rows(stats.layers)):
            events += (_name("thread", name, process, row), _order(process, row))
            for layer, (begin, end) in spans:
                events.append(
                    {
                        "ph": "X",
                        "name": f"layer {layer.number}",
                        "cat": name,
                        "pid": process,
                        "tid": row,
                        "ts": (begin - origin) * _MICROSECONDS,
                        "dur": (end - begin) * _MICROSECONDS,
                        "args": {"nbytes": layer.nbytes, "waited": layer.waited},
                    }
                )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_trace(path: str | Path, passes: Sequence[PassStats]) -> None:
    """Writes ``trace(passes)`` as a JSON file, for https://ui.perfetto.dev or ``chrome://tracing``; blocks."""
    Path(path).write_text(json.dumps(trace(passes)), "utf-8")


def _rows(layers: Sequence[LayerTiming]) -> Iterator[tuple[str, list[tuple[LayerTiming, Span]]]]:
    for stream in range(max((len(layer.copies) for layer in layers), default=0)):
        yield (
            f"copy stream {stream}",
            [(layer, span) for layer in layers if layer.copies for span in layer.copies[stream]],
        )
    # several rides' work on two layers may overlap; a row shows what each adds
    yield "compute", [(layer, (layer.work[1] - layer.compute, layer.work[1])) for layer in layers]
    for slot in sorted({layer.slot for layer in layers if layer.slot is not None}):
        yield f"slot {slot}", [(layer, (_begin(layer), layer.work[1])) for layer in layers if layer.slot == slot]


def _begin(layer: LayerTiming) -> float:
    """Of its first copy, or, where it had none, of the work."""
    return min((begin for stream in layer.copies for begin, _ in stream), default=layer.work[0])


def _name(kind: str, name: str, process: int, row: int = 0) -> dict[str, Any]:
    return {"ph": "M", "name": f"{kind}_name", "pid": process, "tid": row, "args": {"name": name}}


def _order(process: int, row: int) -> dict[str, Any]:
    return {"ph": "M", "name": "thread_sort_index", "pid": process, "tid": row, "args": {"sort_index": row}}
