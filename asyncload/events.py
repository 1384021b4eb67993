"""What a load says about itself while it runs: values, and a stream of them."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal

import anyio

__all__ = ["Progress", "ProgressStream", "Stage"]

Stage = Literal["start", "load", "done"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a load is: bytes and tensors on the device and in all, seconds since it began, bytes a second.

    ``stage`` is ``"start"`` once the plan stands, ``"load"`` as chunks arrive and ``"done"`` in exactly one event, the
    one that says 100 %. ``bytes_resumed`` were there before this load began. ``remaining`` is the expected time left in
    seconds, None before anything has arrived.
    """

    stage: Stage
    bytes_done: int
    bytes_total: int
    bytes_resumed: int = 0
    tensors_done: int
    tensors_total: int
    elapsed: float

    @property
    def rate(self) -> float:
        """Bytes a second since the load began."""
        return (self.bytes_done - self.bytes_resumed) / self.elapsed if self.elapsed > 0 else 0.0

    @property
    def remaining(self) -> float | None:
        """Seconds until the end at the rate so far."""
        return (self.bytes_total - self.bytes_done) / self.rate if self.rate > 0 else None

    @property
    def fraction(self) -> float:
        """The share of bytes that has arrived, 0 to 1; 1 only in the event whose stage is ``"done"``."""
        if self.stage == "done":
            return 1.0
        return min(self.bytes_done / self.bytes_total, 0.999999) if self.bytes_total else 0.0


class ProgressStream:
    """Progress as an async iterator: give it to ``load`` as ``progress`` and iterate it in another task.

    It ends after the ``"done"`` event, or when ``close`` is called (the loader does that when the load ends in any
    other way). A consumer that falls ``limit`` events behind loses the oldest, never the last.
    """

    def __init__(self, limit: int = 1024) -> None:
        self._events: deque[Progress] = deque(maxlen=limit)
        self._changed = anyio.Event()
        self._closed = False

    def __call__(self, progress: Progress) -> None:
        """Takes the next event; the loader calls this on its event loop's thread."""
        self._events.append(progress)
        self._wake(closed=progress.stage == "done")

    def close(self) -> None:
        """Ends the iteration once what is queued has been taken."""
        self._wake(closed=True)

    def _wake(self, *, closed: bool) -> None:
        self._closed = self._closed or closed
        changed, self._changed = self._changed, anyio.Event()
        changed.set()

    def __aiter__(self) -> AsyncIterator[Progress]:
        """The events, each once."""
        return self

    async def __anext__(self) -> Progress:
        """Waits for the next event."""
        while not self._events:
            if self._closed:
                raise StopAsyncIteration
            await self._changed.wait()
        return self._events.popleft()
