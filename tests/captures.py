"""A capture of a CUDA graph by the calling thread, as a server makes one while models load."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

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
    memory = _check(driver.cuMemAlloc(_NBYTES))
    try:
        _check(driver.cuStreamBeginCapture(stream.handle, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL))
        try:
            yield
            _check(driver.cuMemsetD8Async(memory, 1, _NBYTES, stream.handle))
        finally:
            ended = driver.cuStreamEndCapture(stream.handle)
        _check(driver.cuGraphDestroy(_check(ended)))
    finally:
        _check(driver.cuMemFree(memory))
        stream.close()


def _check(result: tuple[Any, ...]) -> Any:
    if int(result[0]) != 0:
        raise RuntimeError(f"the driver refuses: {result[0].name}")
    return result[1] if len(result) > 1 else None
