"""A device stream and the two threads that belong to it.

One thread enqueues work and events, the other waits for the events in their order and then reports. Neither is an
event loop's, as any call to a driver may block.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import anyio

from asyncload.device import Device, Event, Stream
from asyncload.pipeline._spans import ThreadSpans
from asyncload.threads import lower_priority

__all__ = ["StreamWorker"]


# Enqueues a batch's copies and kernels; on the stream's thread.
Enqueue = Callable[[Stream], None]
# Called once the event behind a batch has passed, on another thread: with the error, if there was one, with the moment
# (``time.perf_counter``) from which on it was under way, and with the event, if it could be recorded.
Done = Callable[[BaseException | None, float, Event | None], None]


@dataclass(slots=True)
class _Batch:
    name: str
    enqueue: Enqueue
    done: Done
    timing: bool
    event: Event | None = None
    error: BaseException | None = None
    begin: float = 0.0


class StreamWorker:
    """Runs batches of work on one stream, in order; opening and closing it blocks.

    ``index`` counts the loader's streams. ``room`` is taken by whoever submits a batch and given back when it has
    ended: ``depth`` batches are enough for the stream never to be idle, and more would only stand before those of other
    loads.
    """

    def __init__(self, device: Device, index: int, spans: ThreadSpans, *, depth: int, nice: int) -> None:
        self.index = index
        self.room = anyio.Semaphore(depth, fast_acquire=True)
        self._device = device
        self._spans = spans
        self._stream = device.stream()
        self._submitted: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self._enqueued: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=work, args=(nice,), name=f"asyncload-{name}{index}", daemon=True)
            for name, work in (("stream", self._enqueue), ("events", self._report))
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, name: str, enqueue: Enqueue, done: Done, *, timing: bool = False) -> None:
        """Has a batch and an event behind it enqueued, which notes the time with ``timing``; returns at once.

        ``done`` is called exactly once. Until then the memory that the batch uses must not change.
        """
        self._submitted.put(_Batch(name, enqueue, done, timing))

    def _enqueue(self, nice: int) -> None:
        lower_priority(nice)
        while (batch := self._submitted.get()) is not None:
            batch.begin = time.perf_counter()
            with self._spans.span(f"enqueue {batch.name}"):
                try:
                    self._device.attach()
                    batch.enqueue(self._stream)
                except BaseException as failure:  # noqa: BLE001 - whoever waits for the batch gets it
                    batch.error = failure
                try:
                    # also after a failure: the work before it uses the memory
                    batch.event = self._stream.record(timing=batch.timing)
                except BaseException as failure:  # noqa: BLE001
                    batch.error = batch.error or failure
            self._enqueued.put(batch)
            del batch  # an idle thread keeps nothing of a load alive
        self._enqueued.put(None)

    def _report(self, nice: int) -> None:
        lower_priority(nice)
        while (batch := self._enqueued.get()) is not None:
            with self._spans.span(f"wait for {batch.name}"):
                for step in (self._device.attach, batch.event.synchronize if batch.event is not None else None):
                    try:
                        if step is not None:
                            step()
                    except BaseException as failure:  # noqa: BLE001 - as above; the event is waited for all the same
                        batch.error = batch.error or failure
            batch.done(batch.error, batch.begin, batch.event)
            del batch

    def close(self) -> None:
        """Waits for all work and ends the threads and the stream; blocks."""
        self._submitted.put(None)
        for thread in self._threads:
            thread.join()
        self._stream.close()
