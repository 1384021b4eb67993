"""The contract of a device, that every backend keeps.

Every method here may block (any driver call can wait behind another thread's allocation), so none is ever called on
an event loop's thread. A thread that uses streams calls ``Device.attach`` first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, runtime_checkable

from asyncload.errors import PlanError, RangeError
from asyncload.gguf import GGMLType
from asyncload.options import DeviceKind
from asyncload.quant import DType, cuda

__all__ = [
    "Device",
    "DeviceInfo",
    "DeviceMemory",
    "Event",
    "MemoryInfo",
    "Recipient",
    "Residency",
    "StagingMemory",
    "Stream",
    "WorkOnStream",
    "WorkStream",
    "check_decode",
    "check_download",
    "check_upload",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInfo:
    """What a device is: its ``name`` as the caller writes it, its make, and its memory in bytes.

    ``needs_stream`` says that its memory is used by work on streams alone; else the host may use it, too.
    """

    name: str
    kind: DeviceKind
    index: int
    model: str
    total_bytes: int
    needs_stream: bool = True


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """A device's free and total memory in bytes, as its driver tells them."""

    free: int
    total: int


class Residency(StrEnum):
    """Where memory lies, as a device's driver tells."""

    DEVICE = "the device's own"
    ELSEWHERE = "another device's"
    MANAGED = "managed"
    HOST = "the host's"
    UNKNOWN = "unknown to the driver"


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A range of a device's memory: ``address`` (0 when empty) and ``nbytes``; it owns nothing."""

    address: int
    nbytes: int

    def part(self, offset: int, nbytes: int) -> DeviceMemory:
        """``nbytes`` bytes from ``offset`` on; raises ``RangeError`` if they leave the range."""
        _check_range("range", offset, nbytes, self.nbytes)
        return DeviceMemory(self.address + offset, nbytes)


@runtime_checkable
class StagingMemory(Protocol):
    """Host memory that the device copies from fastest: a writable ``view`` of ``nbytes`` bytes at ``address``."""

    @property
    def view(self) -> memoryview: ...
    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def discard(self, offset: int, nbytes: int) -> None:
        """Says that nobody needs the bytes of a range any more and that no copy still reads them.

        Costs nothing on a real device; one for tests may check the claim and overwrite the bytes.
        """
        ...

    def close(self) -> None:
        """Gives the memory back, once; the caller has seen to it that no copy still reads it.

        Its pages stay mapped until the last slice of ``view`` is gone.
        """
        ...


@runtime_checkable
class Event(Protocol):
    """A point in a stream's work."""

    def done(self) -> bool:
        """Whether all work before it has ended, without waiting. Raises ``DeviceError`` if that work failed."""
        ...

    def synchronize(self) -> None:
        """Sleeps (never spins) until all work before it has ended. Raises ``DeviceError`` if that work failed."""
        ...

    def seconds_since(self, earlier: Event) -> float:
        """The time between two events that have passed and were recorded with timing, by the device's clock.

        Raises ``DeviceError`` for any others.
        """
        ...


@runtime_checkable
class Stream(Protocol):
    """An ordered queue of work on a device; its methods enqueue and do not wait for the work."""

    def upload(
        self, target: DeviceMemory, target_offset: int, staging: StagingMemory, staging_offset: int, nbytes: int
    ) -> None:
        """Enqueues a copy of ``nbytes`` bytes from staging memory into device memory.

        The caller keeps both alive, and the staging bytes unchanged, until an event recorded after this has
        passed. Raises ``RangeError`` before anything moves if either range is left, ``CopyError`` if the driver
        refuses.
        """
        ...

    def decode(self, type: GGMLType, dtype: DType, source: DeviceMemory, target: DeviceMemory) -> None:  # noqa: A002
        """Enqueues the decoding of the blocks of ``type`` that fill ``source`` into weights that fill ``target``.

        The source's address is any; the target's a multiple of 16, or, where the type has no blocks, of the weight's
        size. The words of four bytes around the source's ends are read whole. The pair has been given to
        ``Device.prepare``. The caller keeps both alive until an event recorded after this has passed. Raises, before
        anything is written, ``RangeError`` unless both hold the same number of weights in whole blocks, ``PlanError``
        for another alignment, and ``DeviceError`` for a pair that was not prepared or if the driver refuses.
        """
        ...

    def wait(self, event: Event) -> None:
        """Makes the work that is enqueued after this wait, on the device, until an event has passed.

        The event may be any stream's of this device. What failed before it does not stop the work after this.
        """
        ...

    def record(self, *, timing: bool = False) -> Event:
        """Records and returns a new event after all work enqueued so far; with ``timing`` it notes the time."""
        ...

    def close(self) -> None:
        """Waits for the stream's work and ends it; further calls do nothing."""
        ...


@runtime_checkable
class WorkStream(Protocol):
    """A stream on which others enqueue work."""

    def begin(self, after: Sequence[Event]) -> tuple[Event, Event]:
        """Makes the work that is enqueued after this wait, on the device, until some events have passed.

        Returns events with timing before and behind the waiting. What failed before the others does not stop the work.
        """
        ...

    def end(self) -> Event:
        """An event with timing behind all work that is enqueued by now."""
        ...


class WorkOnStream(ABC):
    """Makes a ``Stream`` a ``WorkStream``, by its own methods."""

    @abstractmethod
    def wait(self, event: Event) -> None:
        """As ``Stream``."""

    @abstractmethod
    def record(self, *, timing: bool = False) -> Event:
        """As ``Stream``."""

    def begin(self, after: Sequence[Event]) -> tuple[Event, Event]:
        """As ``WorkStream``."""
        ready = self.record(timing=True)
        for event in after:
            self.wait(event)
        return ready, self.record(timing=True)

    def end(self) -> Event:
        """As ``WorkStream``."""
        return self.record(timing=True)


class Recipient(Protocol):
    """Whoever is told of memory as soon as it is allocated."""

    def give(self, address: int) -> bool:
        """Takes the address of the next of what was asked for; on any thread.

        Whether there is one after it, with which there is no hurry: a device that can do nothing else meanwhile may
        pause then.
        """
        ...


@runtime_checkable
class Device(Protocol):
    """A place with memory of its own and streams that copy into it; all methods may be called on any thread."""

    @property
    def info(self) -> DeviceInfo: ...

    def attach(self) -> None:
        """Makes this device the current one of the calling thread; cheap when it already is.

        The thread that opened the device is attached; any other attaches before it uses a stream.
        """
        ...

    def allocate(self, nbytes: int) -> DeviceMemory:
        """Allocates ``nbytes`` (zero gives address 0), aligned to 256 bytes.

        Raises ``OutOfDeviceMemoryError`` (with an empty breakdown: the tracker fills it in).
        """
        ...

    def allocate_all(self, sizes: Sequence[int]) -> list[DeviceMemory]:
        """Allocates several, all or none, as ``allocate`` does each."""
        ...

    def allocate_some(self, sizes: Sequence[int], recipient: Recipient) -> list[DeviceMemory]:
        """Allocates as many of several as there is memory for, from the first on, as ``allocate`` does each.

        Each goes to ``recipient`` as soon as it is there. Why there are no more, ``allocate`` of the next one says.
        """
        ...

    def free(self, memory: DeviceMemory) -> None:
        """Gives back what ``allocate`` returned; raises ``DeviceError`` for anything else.

        The caller has seen to it that no enqueued work still uses it.
        """
        ...

    def free_all(self, memory: Collection[DeviceMemory]) -> dict[DeviceMemory, Exception]:
        """Frees several, as ``free`` does each; returns those that could not be, and why."""
        ...

    def staging(self, nbytes: int) -> StagingMemory:
        """Allocates staging memory, touched and, where the device has that, registered (pinned).

        Raises ``DeviceError`` where the host has not enough memory for it.
        """
        ...

    def stream(self) -> Stream:
        """Opens a new stream, independent of all others."""
        ...

    def prepare(self, pairs: Collection[tuple[GGMLType, DType]]) -> None:
        """Makes the kernels of these pairs ready for the streams' ``decode``; may take seconds where they are compiled.

        Raises ``UnsupportedQuantError`` for a pair that has no kernel here, and ``BackendUnavailableError`` where the
        device's compiler is missing.
        """
        ...

    def adopt(self, stream: object) -> WorkStream:
        """A stream of another library, on which work is enqueued; the calling thread need not have attached.

        ``stream`` has ``__cuda_stream__`` (``cuda.core``'s, CuPy's, newer torch's), or a handle as ``cuda_stream``
        (torch's) or ``ptr`` (CuPy's), or is the handle itself; a stream of this device is returned as it is. The caller
        keeps it open. Raises ``DeviceError`` for anything else, and for CUDA's per-thread default stream, which is
        another one on each thread.
        """
        ...

    def barrier(self) -> Event:
        """An event that passes once all work that anyone in this process has enqueued on the device so far has ended.

        "Anyone" includes other libraries' streams. It says that the work has ended, not how.
        """
        ...

    def download(self, memory: DeviceMemory, offset: int, buffer: memoryview) -> None:
        """Fills ``buffer`` from device memory and waits for it; for checks and tests, not for speed.

        It is ordered after nothing: the caller has waited for the work that wrote the memory. Raises ``RangeError``
        if the range is left.
        """
        ...

    def memory(self) -> MemoryInfo:
        """The device's free and total memory now."""
        ...

    def process_memory(self) -> int | None:
        """Bytes of the device's memory that this process takes, allocated by whomever; None where nobody tells."""
        ...

    def residency(self, memory: DeviceMemory) -> Residency:
        """Where a range of memory lies; ``DEVICE`` only if it is part of one allocation of this device's memory.

        Memory that moves between device and host (managed), and memory of the host, registered or not, is not. Of what
        was freed, and of an empty range, it is ``UNKNOWN``; a driver may say that of all memory that is not its own.
        """
        ...

    def close(self) -> None:
        """Ends the backend's own threads; memory already allocated stays valid and can still be freed."""
        ...


def check_upload(
    target: DeviceMemory, target_offset: int, staging: StagingMemory, staging_offset: int, nbytes: int
) -> None:
    """Raises ``RangeError`` unless both ranges of a copy lie inside their memory."""
    _check_range("target", target_offset, nbytes, target.nbytes)
    _check_range("staging", staging_offset, nbytes, staging.nbytes)


def check_decode(type: GGMLType, dtype: DType, source: DeviceMemory, target: DeviceMemory) -> int:  # noqa: A002
    """How many blocks are to be decoded.

    Raises ``RangeError`` unless they fill the source and their weights the target, ``PlanError`` for a target that is
    not aligned to what kernels store.
    """
    n_blocks, rest = divmod(source.nbytes, type.type_size)
    needed = n_blocks * type.block_size * dtype.itemsize
    if rest or needed != target.nbytes:
        raise RangeError(
            f"{source.nbytes} bytes of {type.name} do not decode to {target.nbytes} bytes of {dtype}",
            offset=0,
            nbytes=needed,
            limit=target.nbytes,
        )
    alignment = cuda.ALIGNMENT if type.quantized else dtype.itemsize
    if target.address % alignment:
        raise PlanError(f"a device decodes {type.name} to multiples of {alignment} bytes, not to {target.address:#x}")
    return n_blocks


def check_download(memory: DeviceMemory, offset: int, nbytes: int) -> None:
    """Raises ``RangeError`` unless a range of ``nbytes`` bytes lies inside the memory."""
    _check_range("source", offset, nbytes, memory.nbytes)


def _check_range(what: str, offset: int, nbytes: int, limit: int) -> None:
    if offset < 0 or nbytes < 0 or offset + nbytes > limit:
        raise RangeError(
            f"{nbytes} bytes at {offset} leave the {what} of {limit} bytes",
            offset=offset,
            nbytes=nbytes,
            limit=limit,
        )
