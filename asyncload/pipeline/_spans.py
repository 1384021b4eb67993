"""What a loader's threads do, kept while somebody watches."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

__all__ = ["ThreadSpan", "ThreadSpans"]

_MOST: Final = 1 << 16  # spans that are kept, the last ones


@dataclass(frozen=True, slots=True)
class ThreadSpan:
    """What a thread did from ``begin`` to ``end``, in seconds of ``time.perf_counter`` where nothing else is said."""

    thread: str
    what: str
    begin: float
    end: float


class ThreadSpans:
    """Keeps spans while at least one watches, and costs next to nothing while nobody does; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watching = 0
        self._kept: deque[ThreadSpan] = deque(maxlen=_MOST)

    @property
    def watched(self) -> bool:
        """Whether somebody watches."""
        return self._watching > 0

    @contextmanager
    def watch(self) -> Generator[None]:
        """Has spans kept during the block."""
        with self._lock:
            self._watching += 1
        try:
            yield
        finally:
            with self._lock:
                self._watching -= 1
                if not self._watching:
                    self._kept.clear()

    @contextmanager
    def span(self, what: str) -> Generator[None]:
        """The block is something that the calling thread does."""
        if not self.watched:
            yield
            return
        begin = time.perf_counter()
        try:
            yield
        finally:
            span = ThreadSpan(threading.current_thread().name, what, begin, time.perf_counter())
            with self._lock:
                if self._watching:
                    self._kept.append(span)

    def add(self, spans: Iterable[ThreadSpan]) -> None:
        """Keeps what threads did that are not Python's, in the order of the ends."""
        with self._lock:
            if self._watching:
                self._kept.extend(spans)

    def during(self, begin: float, end: float) -> list[ThreadSpan]:
        """What has ended and has a part between two moments of ``time.perf_counter``, in the order of the ends."""
        with self._lock:
            kept = self._kept.copy()
        return [span for span in kept if span.end >= begin and span.begin <= end]
