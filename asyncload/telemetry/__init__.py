"""What a load tells while it runs: progress to a callback, and a few lines to the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Final

from asyncload.errors import AsyncloadError
from asyncload.events import Progress, ProgressStream, Stage
from asyncload.options import format_size

__all__ = ["ProgressCallback", "ProgressMeter", "ending"]

ProgressCallback = Callable[[Progress], object] | ProgressStream

_log: Final = logging.getLogger("asyncload.load")
_LONG: Final = 1_000_000_000  # bytes from which on each tenth is logged


@contextmanager
def ending(callback: ProgressCallback | None) -> Generator[None]:
    """Ends the iteration over a ``ProgressStream`` when the block raises, however early."""
    try:
        yield
    except BaseException:
        if isinstance(callback, ProgressStream):
            callback.close()
        raise


class ProgressMeter:
    """Counts a load's bytes and tensors; reports each step to ``callback``, start, tenths and end to the log.

    The log's name is ``asyncload.load``. Each tenth is logged for loads above 1 GB. ``resumed`` bytes and tensors were
    there before the load began.
    """

    def __init__(
        self,
        name: str,
        *,
        nbytes: int,
        tensors: int,
        callback: ProgressCallback | None = None,
        resumed: tuple[int, int] = (0, 0),
    ) -> None:
        self._name = name
        self._callback = callback
        self._begin = time.perf_counter()
        self._bytes_resumed, self._tensors_done = resumed
        self._bytes_done = self._bytes_resumed
        self._bytes_total = nbytes
        self._tensors_total = tensors
        self._tenth = 0
        self._started = False

    @property
    def listens(self) -> bool:
        """Whether anybody hears of a chunk before the end."""
        return self._callback is not None or (self._bytes_total > _LONG and _log.isEnabledFor(logging.INFO))

    def start(self) -> None:
        """The plan stands."""
        self._started = True
        _log.info("%s: loading %d tensors, %s", self._name, self._tensors_total, format_size(self._bytes_total))
        self._report("start")

    def tensors(self, count: int) -> None:
        """So many tensors more are complete."""
        self._tensors_done += count

    def chunk(self, nbytes: int) -> None:
        """That many bytes more have arrived."""
        self._bytes_done += nbytes
        if not self._started:  # it never will: what had begun to move is given up
            return
        if (self._bytes_done, self._tensors_done) != (self._bytes_total, self._tensors_total):
            self._report("load")  # the one that completes the load is reported as its end
        tenth = 10 * self._bytes_done // self._bytes_total if self._bytes_total else 0
        if self._bytes_total > _LONG and self._tenth < tenth < 10:  # noqa: PLR2004 - the last tenth is the end
            self._tenth = tenth
            _log.info("%s: %d0 %%, %s", self._name, tenth, format_size(self._bytes_done))

    def done(self) -> None:
        """Everything has arrived; reported once."""
        elapsed = time.perf_counter() - self._begin
        _log.info("%s: loaded %s in %.3f s", self._name, format_size(self._bytes_done), elapsed)
        self._report("done")

    def failed(self, error: BaseException) -> None:
        """The load has ended in any other way."""
        elapsed = time.perf_counter() - self._begin
        _log.log(
            logging.WARNING if isinstance(error, AsyncloadError) else logging.INFO,
            "%s: ended after %s of %s and %.3f s: %s",
            self._name,
            format_size(self._bytes_done),
            format_size(self._bytes_total),
            elapsed,
            type(error).__name__,
        )

    def _report(self, stage: Stage) -> None:
        if self._callback is not None:
            self._callback(
                Progress(
                    stage=stage,
                    bytes_done=self._bytes_done,
                    bytes_total=self._bytes_total,
                    bytes_resumed=self._bytes_resumed,
                    tensors_done=self._tensors_done,
                    tensors_total=self._tensors_total,
                    elapsed=time.perf_counter() - self._begin,
                )
            )
