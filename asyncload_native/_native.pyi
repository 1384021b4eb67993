"""
The data path of asyncload in C++ threads, which never need the interpreter lock.
"""

from collections.abc import Sequence
import enum
from typing import Annotated

import numpy
from numpy.typing import NDArray


version: str = ...

compiler: str = ...

class DriverUnavailableError(ImportError):
    """There is no CUDA driver, or it lacks a function that is needed."""

class DeviceError(RuntimeError):
    """A device refused, or work on it failed."""

class CudaError(DeviceError):
    """
    A function of the CUDA driver failed; its result by ``code`` and ``name``.
    """

    function: str = ...

    code: int = ...

    name: str = ...

class Driver:
    """The CUDA driver's functions, from a library given by name or path."""

    def __init__(self, library: str = ...) -> None:
        """
        Raises DriverUnavailableError where the library, or a function that is needed, is missing.
        """

    @property
    def version(self) -> int:
        """The latest version of CUDA that it knows: 13000 is 13.0."""

class Device:
    """A device's operations, as the engine asks for them."""

class CudaDevice(Device):
    """A CUDA device, in its primary context."""

    def __init__(self, driver: Driver, index: int) -> None:
        """Raises CudaError."""

class HostDevice(Device):
    """Host memory, with a thread for each stream."""

    def __init__(self) -> None: ...

    def set_pace(self, bandwidth: float, latency: float, poison: bool) -> None:
        """
        Sets bytes a second of all copies (0: as memory is), seconds before each, and whether what is free is
        overwritten.
        """

    def fail_copy(self, number: int) -> None:
        """Has a copy fail, by its number: 1 is the next."""

class File:
    """A file held open."""

    @staticmethod
    def share(path: str, descriptor: int) -> File:
        """By a descriptor of its own; raises OSError."""

    @property
    def identity(self) -> tuple[int, int, int, int]:
        """Device, inode, size, and modification time in nanoseconds."""

class FailureKind(enum.Enum):
    """What failed."""

    READ = 0

    ENDED = 1

    CHANGED = 2

    COPY = 3

    DECODE = 4

    DEVICE = 5

class Failure:
    """Why a job ended early."""

    @property
    def kind(self) -> FailureKind: ...

    @property
    def tensor(self) -> int: ...

    @property
    def file(self) -> int: ...

    @property
    def offset(self) -> int: ...

    @property
    def error_number(self) -> int: ...

    @property
    def transient(self) -> bool: ...

    @property
    def code(self) -> str: ...

    @property
    def what(self) -> str: ...

class Times:
    """Where a job's time went, in seconds and bytes."""

    @property
    def read(self) -> float: ...

    @property
    def decode(self) -> float: ...

    @property
    def upload(self) -> float: ...

    @property
    def read_nbytes(self) -> int: ...

    @property
    def decoded_nbytes(self) -> int: ...

    @property
    def uploaded_nbytes(self) -> int: ...

    @property
    def retries(self) -> int: ...

class News:
    """What has happened to a job."""

    @property
    def landed(self) -> list[int]:
        """The tensors that have landed since it was last asked, by their index."""

    @property
    def moved(self) -> int:
        """The bytes of tensors that have."""

    @property
    def ended(self) -> bool:
        """Whether nothing of it is under way any more."""

    @property
    def failure(self) -> Failure | None:
        """Why it ended early, if it did."""

class Wake(enum.Enum):
    """When a job's descriptor becomes readable, beside its end."""

    END = 0

    TENSOR = 1

    CHUNK = 2

class Job:
    """One load."""

    def __init__(self, files: Sequence[File], tensors: Annotated[NDArray[numpy.uint64], dict(shape=(None, 10), order='C', device='cpu', writable=False)], chunk_size: int, wake: Wake, to_host: bool) -> None:
        """
        Cuts tensors, in file order, into chunks. A row has: file, offset, bytes there, bytes of the target, where it
        is decoded (0 nowhere, 1 host, 2 device), bytes of a block, bytes of it decoded, the kernel's handle, blocks
        for each of its groups, whether it is skipped. Raises ValueError if a block does not fit a chunk.
        """

    @property
    def descriptor(self) -> int:
        """An eventfd that is readable when there is news."""

    @property
    def groups(self) -> list[int]:
        """For each tensor, the number of the group that it is moved in."""

    def poll(self) -> News:
        """What has happened since it was last asked."""

    def close(self) -> None:
        """Closes the descriptor; for who has heard of the end."""

    def times(self) -> Times:
        """Where its time went, until now."""

class Engine:
    """Threads that read, decode and copy."""

    def __init__(self, device: Device, ring: int, chunk_size: int, threads: int, buffers: int, nice: int, retries: int, retry_delay: float) -> None:
        """Starts the threads, over a ring of staging buffers that outlives them."""

    def submit(self, job: Job, scratch: Sequence[int], after: Sequence[int]) -> None:
        """
        Has a job moved as far as it is admitted; streams wait for the events ``after`` before, on the device.
        """

    def admit(self, job: Job, groups: int, first: int, targets: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> None:
        """
        Lets the groups below a number be moved, for which the addresses from tensor ``first`` on are given.
        """

    def cancel(self, job: Job) -> None:
        """Has a job end as soon as nothing of it is under way."""

    @property
    def busy(self) -> bool:
        """Whether a job uses a staging buffer."""

    def close(self) -> None:
        """Ends all jobs and the threads; blocks."""
