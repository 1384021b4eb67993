"""Pure Python that takes long, on a thread beside an event loop."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final

__all__ = ["yielding"]

_HOLD: Final = 0.001  # seconds that the interpreter lock is kept at a time
_PAUSE: Final = 0.0001  # seconds in which a thread that waits for it can take it


@contextmanager
def yielding() -> Generator[None]:
    """Lets other threads run at least every millisecond while this one imports Numba and loads what it has cached.

    An event loop that wakes up would otherwise wait for the interpreter's switch interval of 5 ms, each time. A profile
    function, which concerns this thread alone, is where a thread can be stopped between any two calls.
    """
    if threading.current_thread() is threading.main_thread() or sys.getprofile() is not None:
        yield
        return
    released = time.perf_counter()

    def release(*_: Any) -> None:
        nonlocal released
        if time.perf_counter() - released > _HOLD:
            time.sleep(_PAUSE)
            released = time.perf_counter()

    sys.setprofile(release)
    try:
        yield
    finally:
        sys.setprofile(None)
