"""Where bytes go: the contract of a device, and the door to its backends.

Every method of a device may block (any driver call can wait behind another thread's allocation), so none is ever
called on an event loop's thread.
"""

from __future__ import annotations

from asyncload.device._contract import (
    Device,
    DeviceInfo,
    DeviceMemory,
    Event,
    MemoryInfo,
    Recipient,
    Residency,
    StagingMemory,
    Stream,
    WorkOnStream,
    WorkStream,
    check_decode,
    check_download,
    check_upload,
)
from asyncload.device._host import HostDevice
from asyncload.device._several import allocate_until, free_each
from asyncload.errors import DeviceNotFoundError
from asyncload.options import DeviceKind

__all__ = [
    "Device",
    "DeviceInfo",
    "DeviceMemory",
    "Event",
    "HostDevice",
    "MemoryInfo",
    "Recipient",
    "Residency",
    "StagingMemory",
    "Stream",
    "WorkOnStream",
    "WorkStream",
    "allocate_until",
    "check_decode",
    "check_download",
    "check_upload",
    "default_device",
    "free_each",
    "open_device",
    "parse_device",
]


def default_device() -> str:
    """The name of the device used where none is named: ``"cuda:0"`` where a CUDA device can be used, else ``"host"``.

    Blocks on the driver when it is first asked.
    """
    from asyncload.device._cuda import cuda_device_count

    return "cuda:0" if cuda_device_count() > 0 else "host"


def open_device(name: str) -> Device:
    """Opens a device by name: ``"cuda"``, ``"cuda:N"`` or ``"host"``.

    Blocks. Raises ``DeviceNotFoundError`` for a name or number that does not exist here, and
    ``BackendUnavailableError`` where the packages or the driver are missing.
    """
    kind, index = parse_device(name)
    if kind == "host":
        return HostDevice()
    from asyncload.device._cuda import CudaDevice

    return CudaDevice(index)


def parse_device(name: str) -> tuple[DeviceKind, int]:
    """A device's kind and number by its name, whether it is there or not.

    Raises ``DeviceNotFoundError`` for a name that no device can have.
    """
    if name == "host":
        return "host", 0
    kind, _, index = name.partition(":")
    if kind == "cuda" and (index.isdecimal() or name == "cuda"):
        return "cuda", int(index or 0)
    raise DeviceNotFoundError(f"no device is called {name!r}: use 'cuda', 'cuda:N' or 'host'", device=name)
