"""What the link to a device gives by itself."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Final

from asyncload.device import Device
from asyncload.memory import Purpose, VramTracker

__all__ = ["link_rate"]

_NBYTES: Final = 64 << 20
_COPIES: Final = 8


def link_rate(device: Device, tracker: VramTracker) -> float:
    """Bytes a second of copies from pinned memory with nothing beside them; blocks.

    Takes 64 MiB of host memory and of the device's, and gives both back. Raises ``DeviceError``.
    """
    device.attach()
    with ExitStack() as stack:
        stack.callback(tracker.flush)
        target = tracker.allocate(_NBYTES, Purpose.WORKSPACE, "what the link is measured with")
        stack.callback(target.close)
        staging = device.staging(_NBYTES)
        stack.callback(staging.close)
        stream = device.stream()
        stack.callback(stream.close)
        begun = stream.record(timing=True)
        for _ in range(_COPIES):
            stream.upload(target.memory, 0, staging, 0, _NBYTES)
        ended = stream.record(timing=True)
        ended.synchronize()
        return _COPIES * _NBYTES / ended.seconds_since(begun)
