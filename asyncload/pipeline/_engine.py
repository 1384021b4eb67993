"""What a loader owns for its whole life and all of its loads share: device, ledger, staging, threads, streams."""

from __future__ import annotations

from contextlib import ExitStack

from asyncload.device import Device
from asyncload.memory import Scratch, StagingPool, VramTracker
from asyncload.options import Options
from asyncload.pipeline._streams import StreamWorker
from asyncload.threads import Threads

__all__ = ["Engine"]

# Opening, planning, allocating and freeing have threads of their own, so as not to stand behind other loads' reads.
_CALLERS = 2


class Engine:
    """The threads, streams and memory of a loader over one device, which it closes too; opening it blocks.

    Whatever is opened is closed again when a later step of the opening fails.
    """

    def __init__(self, device: Device, options: Options) -> None:
        self.device = device
        self.options = options = options.suited_to(device.info.kind)
        with ExitStack() as stack:
            stack.callback(device.close)
            device.attach()
            self.tracker = VramTracker(device)
            stack.callback(self.tracker.close)
            self.scratch = Scratch(self.tracker, options.chunk_size, options.streams)
            self.staging = StagingPool(device, options.chunk_size, options.buffers)
            stack.callback(self.staging.close)
            self.readers = Threads(options.threads, "asyncload-reader", nice=options.nice)
            stack.callback(self.readers.close)
            self.callers = Threads(_CALLERS, "asyncload-call")
            stack.callback(self.callers.close)
            self.streams: list[StreamWorker] = []
            for index in range(options.streams):
                stream = StreamWorker(device, index, depth=options.depth, nice=options.nice)
                stack.callback(stream.close)
                self.streams.append(stream)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Ends all of it, last opened first; device memory that is still in use stays valid. Blocks."""
        self.device.attach()
        self._stack.close()
