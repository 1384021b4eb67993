"""What the host's threads did during a pass, on the device's clock."""

from __future__ import annotations

import time
from dataclasses import replace

from asyncload.device import Event, Stream
from asyncload.layers._stats import PassStats
from asyncload.pipeline import ThreadSpan, ThreadSpans

__all__ = ["add_threads"]


def add_threads(stats: PassStats, origin: Event, spans: ThreadSpans, stream: Stream) -> PassStats:
    """Adds what threads did from the pass's first copy to its end; ``origin`` is the event at its begin. Blocks.

    One event on ``stream``, which is idle, is on both clocks: it passes while the host waits for it, some ten
    microseconds, and the middle of that is taken for its moment. What may have been during the pass is taken for it.
    """
    before = time.perf_counter()
    event = stream.record(timing=True)
    event.synchronize()
    after = time.perf_counter()
    zero, tolerance = (before + after) / 2 - event.seconds_since(origin), (after - before) / 2
    found = spans.during(zero + stats.earliest - tolerance, zero + stats.wall + tolerance)
    placed = (ThreadSpan(span.thread, span.what, span.begin - zero, span.end - zero) for span in found)
    return replace(stats, threads=tuple(placed))
