"""Sharing the interpreter lock with threads that want it all the time, and with event loops that want it now.

Who waits for the lock asks for it after the interpreter's switch interval, 5 ms, and then one of all who wait gets it:
beside several busy threads it may be another one a hundred times.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

__all__ = ["UNHURRIED", "Pause", "waiting"]

# Seconds of a pause in which an event loop wakes up and takes the lock, twice for each of its timers: mostly, and where
# its cores are busy, too.
_SHORT: Final = 0.0003
UNHURRIED: Final = 0.001
_BEFORE_FIRST: Final = 0.0003  # seconds of work for which others may wait, who may have waited before it
_BETWEEN: Final = 0.0007  # and who have not
_FEW_CORES: Final = 12  # which the threads of a load to a GPU keep busy, if the options do not say otherwise
_TURN: Final = 0.0005  # the switch interval while somebody waits
_DEFAULT_INTERVAL: Final = 0.005  # the interpreter's


class Pause:
    """Called now and then by a loop on a thread, lets others have the interpreter lock, which it would keep for 5 ms.

    It sleeps so many ``seconds`` that an event loop that waits for the lock wakes up and does what is due: uvloop gives
    it up between a timer and the task that it wakes, and after a shorter sleep the loop here has it back by then.
    ``UNHURRIED`` suits a loop for whose end nobody waits. The first pause comes sooner than the next ones: he is due
    who has given the loop its work. Where another thread does not give the lock back before the interpreter makes it,
    or a core came as late as if one did, there are no more before the loop begins anew: whoever wants the lock then
    waits for that thread, not for this one. Short turns (``waiting``) do without where cores are many: the interpreter
    sees to it that others come to the lock. Where the process may use few, who has waited for his turn still waits for
    a core, and again each time that he gives the lock up.
    """

    def __init__(self, seconds: float = _SHORT) -> None:
        self._seconds = seconds
        self._few_cores = len(os.sched_getaffinity(0)) <= _FEW_CORES
        self.begin()

    def begin(self) -> None:
        """The loop begins now."""
        self._not_before = time.perf_counter() + _BEFORE_FIRST

    def __call__(self) -> None:
        """Pauses, if it is time to."""
        if _turns.shortened and not self._few_cores:
            return
        if (begin := time.perf_counter()) < self._not_before:
            return
        kept_for = self._seconds + max(sys.getswitchinterval(), _TURN)
        time.sleep(self._seconds)
        end = time.perf_counter()
        self._not_before = math.inf if end - begin >= kept_for else end + _BETWEEN


class _Turns:
    """The interpreter's switch interval, shorter while somebody waits."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # over all that follows; a block may end in a finalizer, wherever that runs
        self._waiting = 0
        self._before: float | None = None  # the interval that is to come back
        self._ours = 0.0

    @property
    def shortened(self) -> bool:
        """Whether the interval is shorter than it was, and nobody has set one meanwhile."""
        return self._before is not None and sys.getswitchinterval() == self._ours

    def count(self, waiting: int) -> None:
        """So many more wait."""
        with self._lock:
            self._waiting = max(0, self._waiting + waiting)  # a forked child ends blocks that it knows nothing of
            counted = -1
            while counted != (counted := self._waiting):
                self._set_interval()

    def _set_interval(self) -> None:
        interval = sys.getswitchinterval()
        if self._waiting:
            if self._before is None and _TURN < interval <= _DEFAULT_INTERVAL:
                sys.setswitchinterval(_TURN)
                self._before, self._ours = interval, sys.getswitchinterval()
        elif self._before is not None:
            if interval == self._ours:  # also where somebody has set it and then set ours again, as he had found it
                sys.setswitchinterval(self._before)
            self._before = None

    def begin_anew(self) -> None:
        """In a forked child, in which nobody waits, and which may have the lock of a thread that it has not."""
        self._lock = threading.RLock()
        self._waiting = 0
        self._set_interval()


_turns = _Turns()
os.register_at_fork(after_in_child=_turns.begin_anew)


@contextmanager
def waiting() -> Generator[None]:
    """The block waits for threads, and for the lock: whoever has it has to give it up after half a millisecond.

    The interpreter's switch interval is set back behind it, and in a forked child. It stays as it is where it is longer
    than the interpreter's own, as somebody has reasons for that, where it is as short, and where somebody sets it
    meanwhile. Where nobody keeps the lock it says nothing. Threads that work for the block are interrupted as others
    are.
    """
    _turns.count(1)
    try:
        yield
    finally:
        _turns.count(-1)
