"""A capture of a CUDA graph by the calling thread, as a server makes one while models load."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from asyncload.testing._cuda_kernel import check

__all__ = ["capture"]

_NBYTES = 4096


@contextmanager
def capture() -> Generator[None]:
    """Captures one fill of memory on a stream of its own, in the mode that forbids all threads what may disturb it.

    Raises ``RuntimeError`` with the driver's code if something has ended the capture meanwhile.
    """
    core: Any = import_module("cuda.core")
    driver: Any = import_module("cuda.bindings.driver")
    device = core.Device(0)
    device.set_current()
    stream = device.create_stream()
    memory = check(driver.cuMemAlloc(_NBYTES))
    try:
        check(driver.cuStreamBeginCapture(stream.handle, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL))
        try:
            yield
            check(driver.cuMemsetD8Async(memory, 1, _NBYTES, stream.handle))
        finally:
            ended = driver.cuStreamEndCapture(stream.handle)
        check(driver.cuGraphDestroy(check(ended)))
    finally:
        check(driver.cuMemFree(memory))
        stream.close()
