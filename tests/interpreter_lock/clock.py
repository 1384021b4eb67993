"""Clocks by which a test says what time passes, and what somebody else does with the lock in it."""

from __future__ import annotations

from asyncload.interpreter_lock import Pause

__all__ = ["Clock", "SlowClock"]


class Clock:
    """Time that passes where it is slept, ``longer`` than was asked for, as beside a thread that keeps the lock."""

    def __init__(self) -> None:
        self.now, self.longer, self.sleeps = 100.0, 0.0, list[float]()

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds + self.longer

    def work(self, pause: Pause, seconds: float) -> int:
        """How often it pauses in so much work."""
        before, end = len(self.sleeps), self.now + seconds
        while self.now < end:
            slept = self.now
            pause()
            end += self.now - slept
            self.now += 1e-5
        return len(self.sleeps) - before


class SlowClock(Clock):
    """One by which whatever is done takes a millisecond, but for a sleep, which takes what it was asked for."""

    _since_last_look = 0.001

    def perf_counter(self) -> float:
        self.now += self._since_last_look
        self._since_last_look = 0.001
        return self.now

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        self._since_last_look = 0.0
