"""The data path of asyncload in C++ threads, which never need the interpreter lock.

``asyncload`` uses it where it was built, and its own Python engine where it was not: then importing this package raises
ImportError.
"""

from asyncload_native._native import (
    CudaDevice,
    CudaError,
    Device,
    DeviceError,
    Driver,
    DriverUnavailableError,
    Engine,
    Failure,
    FailureKind,
    File,
    HostDevice,
    Job,
    News,
    Race,
    ReaderChoice,
    ReadError,
    Strategy,
    Times,
    Wake,
    compiler,
    is_transient,
    read,
    unavailable,
    version,
)

__all__ = [
    "CudaDevice",
    "CudaError",
    "Device",
    "DeviceError",
    "Driver",
    "DriverUnavailableError",
    "Engine",
    "Failure",
    "FailureKind",
    "File",
    "HostDevice",
    "Job",
    "News",
    "Race",
    "ReadError",
    "ReaderChoice",
    "Strategy",
    "Times",
    "Wake",
    "compiler",
    "is_transient",
    "read",
    "unavailable",
    "version",
]
