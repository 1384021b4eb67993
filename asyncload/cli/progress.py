"""A progress bar on a terminal."""

from __future__ import annotations

import shutil
import time
from typing import TextIO

from asyncload.events import Progress
from asyncload.options import format_size

__all__ = ["ProgressBar"]

_INTERVAL = 0.05  # seconds between drawings: a terminal should not slow a load down
_WIDEST = 40


class ProgressBar:
    """Draws a load's progress on one line of a terminal; give it to ``load`` as ``progress``.

    The last event is always drawn. ``close`` ends the line, so that what follows starts on its own.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._drawn = float("-inf")

    def __call__(self, progress: Progress) -> None:
        """Draws the event, unless the last drawing is too recent."""
        now = time.monotonic()
        if progress.stage == "load" and now - self._drawn < _INTERVAL:
            return
        self._drawn = now
        columns = shutil.get_terminal_size().columns
        numbers = _numbers(progress)
        width = min(_WIDEST, columns - len(numbers) - 4)  # brackets, a space, and the cursor's place
        filled = int(progress.fraction * width)
        bar = f"[{'#' * filled}{'.' * (width - filled)}] " if width > 0 else ""
        # \x1b[K clears what a longer line left behind
        self._stream.write(f"\r{(bar + numbers)[: columns - 1]}\x1b[K")
        self._stream.flush()

    def close(self) -> None:
        """Ends the line, if one was drawn."""
        if self._drawn > float("-inf"):
            self._stream.write("\n")
            self._stream.flush()
            self._drawn = float("-inf")


def _numbers(progress: Progress) -> str:
    parts = [
        f"{int(progress.fraction * 100):3d} %",
        f"{format_size(progress.bytes_done)} of {format_size(progress.bytes_total)}",
        f"{progress.tensors_done}/{progress.tensors_total} tensors",
        f"{progress.rate / 1e9:.2f} GB/s",
    ]
    if progress.stage != "done" and progress.remaining is not None:
        parts.append(f"{progress.remaining:.0f} s left")
    return "  ".join(parts)
