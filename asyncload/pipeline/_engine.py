"""What a loader owns for its whole life and all of its loads share: device, ledger, calling threads, backends."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from asyncload.device import Device
from asyncload.errors import BackendUnavailableError
from asyncload.memory import VramTracker
from asyncload.options import Options
from asyncload.pipeline._backend import Backend
from asyncload.pipeline._native import NativeBackend
from asyncload.pipeline._python import PythonBackend
from asyncload.pipeline._spans import ThreadSpans
from asyncload.source import Source
from asyncload.threads import Threads

__all__ = ["Engine"]

# Opening, planning, allocating and freeing have threads of their own, so as not to stand behind other loads' reads.
_CALLERS = 2


class Engine:
    """The threads, streams and memory of a loader over one device, which it closes too; opening it blocks.

    ``options`` are those of the backend that moves what it can, ``spans`` what its threads do.
    Whatever is opened is closed again when a later step of the opening fails. Raises ``BackendUnavailableError`` if the
    native engine is asked for and is not there.
    """

    def __init__(self, device: Device, options: Options) -> None:
        self.device = device
        self.spans = ThreadSpans()
        self._asked = options
        self._opening = threading.Lock()
        self._python: PythonBackend | None = None
        with ExitStack() as stack:
            stack.callback(device.close)
            device.attach()
            self.tracker = VramTracker(device)
            stack.callback(self.tracker.close)
            self.callers = Threads(_CALLERS, "asyncload-call")
            stack.callback(self.callers.close)
            self._native = self._open_native(stack)
            self.options = (self._native or self._open_python(stack)).options
            self._stack = stack.pop_all()

    def _open_native(self, stack: ExitStack) -> NativeBackend | None:
        if self._asked.engine == "python":
            return None
        try:
            native = NativeBackend(self.device, self.tracker, self.spans, self._asked)
        except BackendUnavailableError:
            if self._asked.engine == "native":
                raise
            return None
        stack.callback(native.close)
        return native

    def _open_python(self, stack: ExitStack) -> PythonBackend:
        options = replace(self._asked, engine="python").suited_to(self.device.info.kind)
        self._python = PythonBackend(self.device, self.tracker, self.spans, options)
        stack.callback(self._python.close)
        return self._python

    def backend(self, sources: Sequence[Source]) -> Backend:
        """The backend that reads such sources: the native one, if it can; may block while the other is opened."""
        if self._native is not None and self._native.reads(sources):
            return self._native
        return self.python

    @property
    def native(self) -> NativeBackend | None:
        """The backend in C++, where there is one."""
        return self._native

    @property
    def python(self) -> PythonBackend:
        """The backend in Python, opened when it is first needed; may block."""
        with self._opening:
            return self._python or self._open_python(self._stack)

    @property
    def idle(self) -> bool:
        """Whether no staging buffer is in use."""
        return all(backend.idle for backend in (self._native, self._python) if backend is not None)

    def close(self) -> None:
        """Ends all of it, last opened first; device memory that is still in use stays valid. Blocks."""
        self.device.attach()
        self._stack.close()
