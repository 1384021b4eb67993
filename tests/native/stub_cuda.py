"""What a test asks of the stand-in for the CUDA driver, ``stub_cuda.cpp``."""

from __future__ import annotations

import ctypes
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["StubCuda"]


class StubCuda:
    """What a test asks of the stand-in beside the driver's own functions, which are called by ``call``."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._library = ctypes.CDLL(self.path)
        self._library.stub_calls.restype = ctypes.c_size_t
        self._library.stub_callers.restype = ctypes.c_size_t
        self._library.stub_live.restype = ctypes.c_size_t
        self._library.stub_calls_here.restype = ctypes.c_size_t
        self._library.stub_kernel.restype = ctypes.c_void_p
        self._library.stub_violation.restype = ctypes.c_char_p

    def reset(self, capacity: int = 1 << 30) -> None:
        """Makes it as it was when it was loaded, with ``capacity`` bytes of device memory."""
        self._library.stub_reset(ctypes.c_size_t(capacity))

    def call(self, function: str, *arguments: object) -> int:
        """Calls a function of the driver, with 64 bits for an int, and returns its ``CUresult``."""
        words = [ctypes.c_uint64(value) if isinstance(value, int) else value for value in arguments]
        return int(self._library[function](*words))

    def make(self, function: str, *arguments: object) -> int:
        """Calls a function that gives something by its first argument, and returns that."""
        made = ctypes.c_uint64()
        assert self.call(function, ctypes.byref(made), *arguments) == 0
        return made.value

    def attach(self) -> None:
        """Starts the driver and makes the device's context the calling thread's."""
        assert self.call("cuInit", 0) == 0
        assert self.call("cuCtxSetCurrent", self.make("cuDevicePrimaryCtxRetain", 0)) == 0

    def fail(self, function: str, code: int, *, nth: int = 1, lasting: bool = False) -> None:
        """Has the ``nth`` call from now on of a function fail; of "work", the ``nth`` copy or kernel on a stream.

        ``lasting``: and all calls after it.
        """
        self._library.stub_fail(function.encode(), ctypes.c_size_t(nth), ctypes.c_int(code), ctypes.c_bool(lasting))

    def calls(self, function: str) -> int:
        """How often a function was called.

        For "work", how many copies and kernels were begun; for "upload", how many copies to the device were enqueued.
        """
        return int(self._library.stub_calls(function.encode()))

    def callers(self, function: str) -> int:
        """How many threads have called a function since ``forget_callers``."""
        return int(self._library.stub_callers(function.encode()))

    def forget_callers(self) -> None:
        """Begins anew with ``callers``."""
        self._library.stub_forget_callers()

    def hold(self, held: bool) -> None:
        """While held, no stream begins anything."""
        self._library.stub_hold(ctypes.c_bool(held))

    def stall(self, stalled: bool) -> None:
        """While stalled, no call of cuEventRecord returns."""
        self._library.stub_stall(ctypes.c_bool(stalled))

    @contextmanager
    def capturing(self) -> Generator[None]:
        """Meanwhile the calling thread captures a graph in the global mode.

        A call of a thread that has not left that mode is refused, and a violation.
        """
        self._library.stub_capture(ctypes.c_bool(True))
        try:
            yield
        finally:
            self._library.stub_capture(ctypes.c_bool(False))

    @property
    def combines(self) -> bool:
        """Whether it takes several copies in one call, as drivers do from CUDA 12.8 on."""
        return hasattr(self._library, "cuMemcpyBatchAsync")

    def barrier(self) -> None:
        """Waits until all has ended that is enqueued by now."""
        self._library.stub_barrier()

    @property
    def calls_here(self) -> int:
        """How many calls of the driver the calling thread has made."""
        return int(self._library.stub_calls_here())

    def delay(self, seconds: float) -> None:
        """Each copy to the device takes this much longer."""
        self._library.stub_delay(ctypes.c_uint64(int(seconds * 1e9)))

    def kernel(self, address: int, blocks_per_group: int) -> int:
        """A decoding kernel that is a C function ``(source, target, n_blocks) -> 1``, by its address."""
        return int(self._library.stub_kernel(ctypes.c_void_p(address), ctypes.c_uint64(blocks_per_group)))

    @property
    def double(self) -> int:
        """The address of a host kernel, which makes two of each byte; "stub_double" for ``fail`` and ``calls``."""
        return ctypes.cast(self._library.stub_double, ctypes.c_void_p).value or 0

    @property
    def sleep(self) -> int:
        """The address of a host kernel, which sleeps for a microsecond a block."""
        return ctypes.cast(self._library.stub_sleep, ctypes.c_void_p).value or 0

    def live(self, what: str) -> int:
        """How many there are of "contexts" (retained), "memory", "registered", "streams" or "events"."""
        return int(self._library.stub_live(what.encode()))

    @property
    def violations(self) -> list[str]:
        """What was done and must not be."""
        found: list[str] = []
        while (text := self._library.stub_violation(ctypes.c_size_t(len(found)))) is not None:
            found.append(text.decode())
        return found
