"""A device stream and the two threads that belong to it.

One thread enqueues copies and events, the other waits for the events in their order and then reports. Neither is an
event loop's, as any call to a driver may block.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from asyncload.device import Device, DeviceMemory, Event, StagingMemory
from asyncload.threads import Threads, lower_priority

__all__ = ["Copy", "StreamWorker"]


@dataclass(frozen=True, slots=True)
class Copy:
    """One copy from staging into device memory; offsets and size in bytes."""

    target: DeviceMemory
    target_offset: int
    staging: StagingMemory
    staging_offset: int
    nbytes: int


@dataclass(slots=True)
class _Enqueued:
    event: Event | None
    error: BaseException | None
    begin: float
    done: Callable[[BaseException | None, float], None]


class StreamWorker:
    """Runs copies on one stream, at most ``depth`` batches at a time; opening and closing it blocks."""

    def __init__(self, device: Device, index: int, *, depth: int, nice: int) -> None:
        self._stream = device.stream()
        self._room = threading.Semaphore(depth)
        self._enqueuer = Threads(1, f"asyncload-stream{index}", nice=nice, setup=device.attach)
        self._enqueued: queue.SimpleQueue[_Enqueued | None] = queue.SimpleQueue()
        self._reporter = threading.Thread(
            target=self._report, args=(device, nice), name=f"asyncload-events{index}", daemon=True
        )
        self._reporter.start()

    async def submit(self, copies: Sequence[Copy], done: Callable[[BaseException | None, float], None]) -> None:
        """Enqueues copies and an event behind them; returns when they are enqueued.

        Once the event has passed, ``done`` is called, exactly once and on another thread, with the error if there was
        one and with the moment (``time.perf_counter``) from which on the copies were under way. Until then the staging
        memory must not change.
        """
        await self._enqueuer.run(self._enqueue, copies, done)

    def _enqueue(self, copies: Sequence[Copy], done: Callable[[BaseException | None, float], None]) -> None:
        self._room.acquire()
        begin = time.perf_counter()
        error: BaseException | None = None
        event: Event | None = None
        try:
            for copy in copies:
                self._stream.upload(copy.target, copy.target_offset, copy.staging, copy.staging_offset, copy.nbytes)
        except BaseException as failure:  # noqa: BLE001 - whoever waits for the copies gets it
            error = failure
        try:
            event = self._stream.record()  # also after a failure: the copies before it still read the buffer
        except BaseException as failure:  # noqa: BLE001
            error = error or failure
        self._enqueued.put(_Enqueued(event, error, begin, done))

    def _report(self, device: Device, nice: int) -> None:
        lower_priority(nice)
        device.attach()
        while (batch := self._enqueued.get()) is not None:
            error = batch.error
            try:
                if batch.event is not None:
                    batch.event.synchronize()
            except BaseException as failure:  # noqa: BLE001 - as above
                error = error or failure
            self._room.release()
            batch.done(error, batch.begin)

    def close(self) -> None:
        """Waits for all work and ends the threads and the stream; blocks."""
        self._enqueuer.close()
        self._enqueued.put(None)
        self._reporter.join()
        self._stream.close()
