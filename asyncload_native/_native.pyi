"""
The data path of asyncload in C++ threads, which never need the interpreter lock.
"""

from collections.abc import Sequence
import enum
from typing import Annotated, Final

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

class ReadError(OSError):
    """
    The bytes of a file could not be had: reading ``failed``, the file ``ended``, or it is ``changed``.
    """

    kind: str = ...

    offset: int = ...

    transient: bool = ...

class Driver:
    """The CUDA driver's functions, from a library given by name or path."""

    def __init__(self, library: str = ...) -> None:
        """
        Raises DriverUnavailableError where the library, or a function that is needed, is missing.
        """

    @property
    def version(self) -> int:
        """The latest version of CUDA that it knows: 13000 is 13.0."""

class Event:
    """A point in a stream's work."""

    def done(self) -> bool:
        """
        Whether the work before it has ended; raises DeviceError if that failed.
        """

    def synchronize(self) -> None:
        """Sleeps until it has; raises DeviceError if it failed."""

    def seconds_since(self, earlier: Event) -> float:
        """The time between two that have passed, in seconds."""

    @property
    def passed_at(self) -> float | None:
        """When it passed, in seconds of the host's clock, where that tells."""

    @property
    def handle(self) -> int:
        """What other libraries know it by; 0 on the host."""

class Device:
    """A device's operations, as the engine asks for them."""

    def adopt_event(self, handle: int) -> Event:
        """Somebody else's event, as long as its owner keeps it."""

class Recipient:
    """Whoever is told of memory as soon as it is allocated."""

class CudaDevice(Device):
    """A CUDA device, in its primary context."""

    def __init__(self, driver: Driver, index: int) -> None:
        """Raises CudaError."""

    def allocate(self, sizes: Sequence[int]) -> list[int]:
        """
        The addresses of memory of these sizes, all or none, 0 for none. Raises CudaError.
        """

    def allocate_some(self, sizes: Sequence[int], recipient: Recipient) -> list[int]:
        """
        As many of these as there is memory for, from the first on; each goes to the recipient at once. Raises
        CudaError where none was tried.
        """

    def free(self, addresses: Sequence[int]) -> list[int]:
        """Frees what was allocated; a CUresult for each, 0 where it was freed."""

    def begin_work(self, stream: int, after: Sequence[Event], patience: float = ...) -> tuple[Event, Event]:
        """
        Has what is enqueued from now on on another library's stream, by its handle, wait for events; the timed
        events before and behind that. A thread of the device's calls the driver; the interpreter lock is kept
        meanwhile, for ``patience`` seconds at most. Raises CudaError.
        """

    def end_work(self, stream: int, patience: float = ...) -> Event:
        """
        A timed event behind what is enqueued on another library's stream by now; the interpreter lock is kept as
        by ``begin_work``. Raises CudaError.
        """

    def close(self) -> None:
        """
        Ends the threads that make calls; whoever begins or ends work later makes his calls himself.
        """

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

    def uses(self, address: int, nbytes: int) -> int:
        """
        How many pieces of work that were enqueued and have not ended read or write some memory.
        """

class File:
    """A file held open."""

    @staticmethod
    def share(path: str, descriptor: int) -> File:
        """By a descriptor of its own, or raises ReadError."""

    @staticmethod
    def open(path: bytes, head: int, patience: float = ...) -> tuple[File, bytes]:
        """
        Opens a regular file and reads its first bytes, ``head`` of them or all there are, in one go; or raises
        ReadError. A thread of its own does that; the interpreter lock is kept meanwhile, for ``patience``
        seconds at most.
        """

    def read(self, offset: int, buffer: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')]) -> None:
        """Fills a buffer, or raises ReadError, also if the file has changed."""

    @property
    def identity(self) -> tuple[int, int, int, int]:
        """Device, inode, size, and modification time in nanoseconds."""

    def fail_read(self, number: int, error_number: int) -> None:
        """For tests: has a read of loads fail, by its number: 1 is the next."""

class FailureKind(enum.Enum):
    """What failed."""

    READ = 0

    ENDED = 1

    CHANGED = 2

    COPY = 3

    DEVICE = 4

class Failure:
    """Why a job ended early."""

    @property
    def kind(self) -> FailureKind: ...

    @property
    def tensor(self) -> int: ...

    @property
    def file(self) -> int: ...

    @property
    def offset(self) -> int | None: ...

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

    def __init__(self, files: Sequence[File], tensors: Annotated[NDArray[numpy.uint64], dict(shape=(None, 10), order='C', device='cpu', writable=False)], chunk_size: int, rising: int, wake: Wake, to_host: bool, timed: bool, ahead: bool) -> None:
        """
        Cuts tensors, in file order, into chunks, of which the first ``rising`` ones rise in size. A row has:
        file, offset, bytes there, bytes of the target, where it is decoded (0 nowhere, 1 host, 2 device),
        bytes of a block, bytes of it decoded, the kernel's handle, blocks for each of its groups, whether it is
        skipped. ``ahead``: chunks may be read before they are admitted. Raises ValueError if a block does not
        fit a chunk.
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

    @property
    def reading(self) -> str:
        """How its files are read, and why."""

    def copies(self) -> list[list[tuple[Event, Event]]]:
        """
        By thread, events before and behind the copies of each chunk, if it is timed.
        """

    def times(self) -> Times:
        """Where its time went, until now."""

    def take_spans(self) -> list[tuple[str, int, int, float, float]]:
        """
        What threads did since it was last asked, if it is timed; the subject is the first of a chunk's tensors.
        """

def cut(tensors: Annotated[NDArray[numpy.uint64], dict(shape=(None, 10), order='C', device='cpu', writable=False)], chunk_size: int, rising: int = ...) -> list[tuple[int, int, int, int, list[tuple[int, int, int, int, int, int, int]]]]:
    """
    The chunks of a job: group, file, offset and bytes, and of each tensor's share: the tensor, the offset and
    bytes of what is read, of what is uploaded, and of the target.
    """

def skip_strings(buffer: bytearray, position: int, first: int, count: int, every: int) -> tuple[int, int, int, bytes]:
    """
    Passes over at most ``count`` strings of a GGUF array, from a position on, as long as their lengths are
    there; the first has the index ``first``. How many these were, the position behind the last, beyond the
    buffer if that is not all there, its own, and as 64-bit numbers those of each ``every``-th.
    """

def read_entries(buffer: bytearray, position: int, most: int, longest: int) -> list[tuple[str, tuple[int, ...], int, int, int]]:
    """
    At most ``most`` tensors' entries of a GGUF header, up to the first that is not all there or has something
    wrong: name, shape (row-major), type, offset and the position behind. ``longest``: of names, in bytes.
    """

def unmap(address: int, nbytes: int) -> None:
    """
    Gives whole pages back to the system, and makes way for other threads now and then.
    """

class Strategy(enum.Enum):
    """A way of reading."""

    PREAD = 0

    DIRECT = 1

    URING = 2

    URING_DIRECT = 3

def unavailable(strategy: Strategy, file: File) -> str | None:
    """Why a file cannot be read like this here, or None."""

def read(file: File, offset: int, buffer: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')], strategy: Strategy) -> None:
    """Fills a buffer, or raises ReadError."""

def is_transient(error_number: int) -> bool:
    """Whether a read that failed with it may succeed when it is made again."""

class Race:
    """Finds out which strategy is the fastest."""

    def __init__(self) -> None: ...

    distance: Final[int] = ...
    """Bytes that each strategy reads before one of them wins."""

    margin: Final[float] = ...
    """How many times as fast as pread another must be."""

    def next(self) -> Strategy:
        """Whose turn it is."""

    def give(self, strategy: Strategy, nbytes: int) -> None:
        """It reads these bytes now."""

    def report(self, strategy: Strategy, nbytes: int, seconds: float) -> None:
        """What came of it."""

    def drop(self, strategy: Strategy, reason: str) -> None:
        """It cannot be used."""

    @property
    def winner(self) -> Strategy | None:
        """None before there is one."""

    def describe(self) -> str:
        """The winner and the figures, in words."""

class ReaderChoice:
    """Reads the files of a load, as suits them."""

    def __init__(self, files: Sequence[File]) -> None: ...

    def read(self, file: File, offset: int, buffer: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')]) -> None:
        """Fills a buffer, or raises ReadError."""

    def choose(self, file: File, offset: int, nbytes: int) -> Strategy | None:
        """The strategy for some bytes, or None for pread without a report."""

    def report(self, strategy: Strategy, nbytes: int, seconds: float) -> None:
        """What came of it."""

    @property
    def reason(self) -> str:
        """What was chosen until now, and why."""

class Engine:
    """Threads that read, decode and copy."""

    def __init__(self, device: Device, ring: object, chunk_size: int, threads: int, buffers: int, nice: int, retries: int, retry_delay: float) -> None:
        """
        Starts the threads, over a ring of staging buffers at ``ring.address``, which is kept as long as they are.
        """

    def submit(self, job: Job, scratch: Sequence[int], after: Sequence[Event]) -> None:
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

class Admission(Recipient):
    """Has a job's tensors moved as those that are awaited get their memory."""

    def __init__(self, engine: Engine, job: Job, targets: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)], awaited: Sequence[int]) -> None:
        """
        ``targets``: of all tensors, whatever for those awaited, which are given by their numbers, in order. The
        job has been submitted, and nobody else admits anything of it meanwhile.
        """

    def give(self, address: int) -> bool:
        """
        The memory of the next one; whether there is one after it, with which there is no hurry, while chunks
        wait for a thread. Raises IndexError where all have theirs.
        """

    @property
    def admitted(self) -> int:
        """How many tensors the engine knows the targets of."""

class FeedFailure:
    """Why a feeding failed."""

    @property
    def what(self) -> str:
        """What the device said."""

    @property
    def code(self) -> str:
        """And its name for it."""

    @property
    def of_copy(self) -> bool:
        """Whether it was a copy, or work that copies are among."""

class FeedNews:
    """What has come of a feeding."""

    @property
    def number(self) -> int:
        """Whose."""

    @property
    def has_arrived(self) -> bool:
        """
        That its copies have ended, or else that they are enqueued, and what had the slot before has ended.
        """

    @property
    def failure(self) -> FeedFailure | None:
        """Why, if it failed."""

    @property
    def begun(self) -> list[Event]:
        """Events before its copies, one for each stream, when it is enqueued."""

    @property
    def arrived(self) -> list[Event]:
        """Events behind them."""

class LayerFeed:
    """Brings layers out of registered host memory into slots."""

    def __init__(self, device: Device, layers: Sequence[Annotated[NDArray[numpy.uint64], dict(shape=(None, 6), order='C', device='cpu', writable=False)]], streams: int, scratch: Sequence[int], each_arrival: bool, trace: bool, nice: int) -> None:
        """
        A row of a layer has: address, bytes, offset in the slot, and the kernel's handle, blocks for each of its
        groups, and blocks, 0 for what is copied as it is.
        """

    def feed(self, layer: int, slot: int, after: Sequence[Event]) -> int:
        """
        Has a layer, by its index, enqueued into the slot at an address, behind events that the caller keeps until
        he is told; the number by which he is.
        """

    @property
    def descriptor(self) -> int:
        """An eventfd that is readable when something is to be told."""

    def poll(self) -> list[FeedNews]:
        """What has come since it was last asked."""

    def take_spans(self) -> list[tuple[str, int, int, float, float]]:
        """
        What threads did since it was last asked, if that is noted; the subject is the layer.
        """

    @property
    def streams(self) -> list[int]:
        """What other libraries know the streams by; 0 on the host."""

    def close(self) -> None:
        """Waits for what is under way, and ends threads and streams."""

def consume(feed: LayerFeed, device: Device, slots: Sequence[int], passes: int, kernel: int, amount: int) -> float:
    """
    Goes through a feed's layers without the interpreter, with a kernel for each, of one group of threads, that is
    given the slot's address twice and ``amount``; returns the seconds. For measuring.
    """
