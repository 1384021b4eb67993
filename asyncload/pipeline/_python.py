"""The backend in Python: reading threads, staging buffers and stream workers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack

from asyncload.device import Device
from asyncload.memory import Scratch, StagingPool, VramTracker
from asyncload.options import Options
from asyncload.pipeline._backend import Sink
from asyncload.pipeline._python_transfer import PythonTransfer
from asyncload.pipeline._spans import ThreadSpans
from asyncload.pipeline._streams import StreamWorker
from asyncload.plan import LoadPlan
from asyncload.source import Source
from asyncload.threads import Threads

__all__ = ["PythonBackend"]


class PythonBackend:
    """Reads from any source; opening it blocks.

    Whatever is opened is closed again when a later step of the opening fails.
    """

    def __init__(self, device: Device, tracker: VramTracker, spans: ThreadSpans, options: Options) -> None:
        self.options = options
        self.spans = spans
        self.scratch = Scratch(tracker, options.chunk_size, options.scratch_chunks)
        with ExitStack() as stack:
            self.staging = StagingPool(device, options.chunk_size, options.buffers)
            stack.callback(self.staging.close)
            self.readers = Threads(options.threads, "asyncload-reader", nice=options.nice)
            stack.callback(self.readers.close)
            self.streams: list[StreamWorker] = []
            for index in range(options.streams):
                stream = StreamWorker(device, index, spans, depth=options.depth, nice=options.nice)
                stack.callback(stream.close)
                self.streams.append(stream)
            self._stack = stack.pop_all()

    def transfer(
        self, plan: LoadPlan, sources: Sequence[Source], sink: Sink, *, skip: Collection[int] = (), timed: bool = False
    ) -> PythonTransfer:
        """A transfer by tasks of the running event loop, which may be ``timed`` by events around its copies."""
        return PythonTransfer(self, plan, sources, sink, skip=skip, timed=timed)

    @property
    def idle(self) -> bool:
        """Whether all staging buffers are free."""
        return self.staging.free == self.options.buffers

    def close(self) -> None:
        """Ends all of it, last opened first; blocks."""
        self._stack.close()
