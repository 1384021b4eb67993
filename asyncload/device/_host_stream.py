"""The host device's copies: an engine that can be slowed and made to fail, streams with a thread each, events."""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

from asyncload.device._contract import DeviceMemory, Event, StagingMemory, WorkOnStream, check_decode, check_upload
from asyncload.errors import CopyError, DeviceError
from asyncload.gguf import GGMLType
from asyncload.quant import DType, decode
from asyncload.threads import lower_priority

__all__ = ["CopyEngine", "Hold", "HostEvent", "HostStream", "NativeHostEvent", "PassedAll"]

_NICE = 10
_PIECE = 4 << 20  # bytes moved at once: of more, the C library copies in another way, and sizes could not be compared
_NAP = 0.002  # seconds that a piece of a slowed copy takes: it reads its source until shortly before its end


@dataclass(eq=False, slots=True)
class Work:
    """What reads and writes memory until it has ended."""

    source: DeviceMemory
    target: DeviceMemory

    def touches(self, address: int, nbytes: int) -> bool:
        return any(
            memory.address < address + nbytes and address < memory.address + memory.nbytes
            for memory in (self.source, self.target)
        )


@dataclass(eq=False, slots=True)
class _Copy(Work):
    """A copy, enqueued at a moment of ``time.perf_counter``."""

    fails: bool
    enqueued: float = field(default_factory=time.perf_counter)

    @property
    def nbytes(self) -> int:
        return self.source.nbytes


class CopyEngine:
    """What all streams of a host device copy through.

    ``bandwidth`` in bytes a second is shared by all streams (None: as fast as memory is, each stream by itself);
    ``latency`` in seconds passes before each copy of a stream. Both may be set at any time. ``poison`` is what a
    target is filled with until its bytes come.
    """

    def __init__(self, device: str, bandwidth: float | None, latency: float, poison: int | None = None) -> None:
        self.device = device
        self.bandwidth = bandwidth
        self.latency = latency
        self.poison = poison
        self.native: Any = None  #: the ``asyncload_native.HostDevice``, once there is one
        self._lock = threading.Lock()
        self._under_way: set[Work] = set()
        self._busy_until = 0.0
        self._accepted = 0
        self._to_fail: set[int] = set()
        self._to_refuse: set[int] = set()
        self._lasts = False
        self.lost: CopyError | None = None  #: the failure after which nothing works any more

    def fail(self, number: int, *, refused: bool, lasting: bool) -> None:
        """Makes the copy that comes as the ``number``-th from now fail: when it is enqueued, or else on its way."""
        with self._lock:
            (self._to_refuse if refused else self._to_fail).add(self._accepted + number)
            self._lasts = lasting

    def _failure(self, nbytes: int, what: str) -> CopyError:
        error = CopyError(f"{self.device}: a copy of {nbytes} bytes {what}, as a test asked", device=self.device)
        if self._lasts:
            self.lost = error
        return error

    def failing(self) -> list[int]:
        """Which copies are to fail, or to be refused, counted from now on."""
        with self._lock:
            return sorted(
                number - self._accepted for number in self._to_fail | self._to_refuse if number > self._accepted
            )

    def accept(self, target: DeviceMemory, source: DeviceMemory) -> _Copy:
        """Counts a copy as under way. Raises ``CopyError`` if it is to be refused."""
        with self._lock:
            self._accepted += 1
            if self._accepted in self._to_refuse:
                raise self._failure(source.nbytes, "was refused")
            copy = _Copy(source, target, fails=self._accepted in self._to_fail)
            self._under_way.add(copy)
        return copy

    def begin(self, work: Work) -> None:
        """Counts work as under way."""
        with self._lock:
            self._under_way.add(work)

    def end(self, work: Work) -> None:
        """It has ended."""
        with self._lock:
            self._under_way.discard(work)

    def perform(self, copy: _Copy, not_before: float) -> float:
        """Does a copy, as slowly as it should be, and returns the moment at which it was to end; blocks."""
        try:
            if copy.fails:
                raise self._failure(copy.nbytes, "failed")
            if self.poison is not None:
                ctypes.memset(copy.target.address, self.poison, copy.nbytes)
            begin = max(copy.enqueued, not_before) + self.latency
            if self.bandwidth is None:
                _sleep_until(begin)
                for offset in range(0, copy.nbytes, _PIECE):
                    size = min(_PIECE, copy.nbytes - offset)
                    ctypes.memmove(copy.target.address + offset, copy.source.address + offset, size)
                return begin
            # The timetable counts from when the engine was free, not from when this thread woke up for it: else each
            # copy would add the oversleep of the one before.
            bandwidth = self.bandwidth
            with self._lock:
                begin = max(begin, self._busy_until)
                self._busy_until = begin + copy.nbytes / bandwidth
            piece = max(_PIECE, int(bandwidth * _NAP))
            for offset in range(0, copy.nbytes, piece):
                size = min(piece, copy.nbytes - offset)
                _sleep_until(begin + (offset + size) / bandwidth)
                ctypes.memmove(copy.target.address + offset, copy.source.address + offset, size)
            return begin + copy.nbytes / bandwidth
        finally:
            self.end(copy)

    def check_unused(self, what: str, address: int, nbytes: int) -> None:
        """Raises ``DeviceError`` if work that has not ended reads or writes the range."""
        with self._lock:
            users = sum(work.touches(address, nbytes) for work in self._under_way)
        if self.native is not None:
            users += self.native.uses(address, nbytes)
        if users:
            raise DeviceError(f"{self.device}: {what} while {users} pieces of work still use it", device=self.device)


class HostEvent:
    """Passes once its stream has come to it, with the first error of the work since the event recorded before it."""

    __slots__ = ("_error", "_passed", "passed_at")

    def __init__(self) -> None:
        self._passed = threading.Event()
        self._error: DeviceError | None = None
        self.passed_at: float | None = None  #: in seconds of ``time.perf_counter``

    def done(self) -> bool:
        """Whether it has passed."""
        if not self._passed.is_set():
            return False
        self.synchronize()
        return True

    def synchronize(self) -> None:
        """Sleeps until it has passed."""
        self._passed.wait()
        if self._error is not None:
            raise self._error

    def seconds_since(self, earlier: Event) -> float:
        """By the host's clock."""
        return _seconds_between(earlier, self)

    def wait(self) -> None:
        """Sleeps until it has passed, however the work before it ended."""
        self._passed.wait()

    def finish(self, error: DeviceError | None) -> None:
        """Makes it pass; on its stream's thread."""
        self._error = error
        self.passed_at = time.perf_counter()
        self._passed.set()


class NativeHostEvent:
    """An event that a C++ thread records."""

    __slots__ = ("native",)

    def __init__(self, native: Any) -> None:
        self.native: Any = native  #: the ``asyncload_native.Event``

    @property
    def passed_at(self) -> float | None:
        """In seconds of ``time.perf_counter``."""
        seconds: float | None = self.native.passed_at
        return seconds

    def done(self) -> bool:
        """Whether it has passed."""
        with _mapping_errors():
            return bool(self.native.done())

    def synchronize(self) -> None:
        """Sleeps until it has passed."""
        with _mapping_errors():
            self.native.synchronize()

    def seconds_since(self, earlier: Event) -> float:
        """By the host's clock."""
        return _seconds_between(earlier, self)

    def wait(self) -> None:
        """Sleeps until it has passed, however the work before it ended."""
        with suppress(DeviceError):
            self.synchronize()


def _seconds_between(earlier: Event, later: HostEvent | NativeHostEvent) -> float:
    begin = earlier.passed_at if isinstance(earlier, HostEvent | NativeHostEvent) else None
    if begin is None or later.passed_at is None:
        raise DeviceError("host: there is no time between events that have not passed", device="host")
    return later.passed_at - begin


@contextmanager
def _mapping_errors() -> Generator[None]:
    """Turns what C++ raises into an error of ours."""
    try:
        yield
    except RuntimeError as error:
        raise CopyError(f"host: {error}", device="host") from error


class Hold(threading.Event):
    """Work that ends when it is set, or, as a context manager, at the end of the block."""

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Ends the work."""
        self.set()


class PassedAll:
    """An event made of several marks in other work."""

    __slots__ = ("_marks",)

    def __init__(self, marks: Sequence[threading.Event]) -> None:
        self._marks = marks

    def done(self) -> bool:
        """Whether all marks are set."""
        return all(mark.is_set() for mark in self._marks)

    def synchronize(self) -> None:
        """Sleeps until all marks are set."""
        for mark in self._marks:
            mark.wait()

    def seconds_since(self, earlier: Event) -> float:  # noqa: ARG002 - the contract's
        """It notes no time."""
        raise DeviceError("host: a barrier notes no time", device="host")


class HostStream(WorkOnStream):
    """A thread that does enqueued work in order; ``closed`` is told when it has ended.

    It decodes the pairs that are ``prepared`` by then.

    A failed copy does not stop the ones after it; the next event that is recorded reports it, and no later one. The
    thread is nicer than the process's others: it stands for a copy engine, which takes no processor from anybody.
    """

    def __init__(
        self,
        engine: CopyEngine,
        name: str,
        *,
        prepared: Collection[tuple[GGMLType, DType]],
        check_thread: Callable[[], None],
        closed: Callable[[HostStream], None],
    ) -> None:
        self._engine = engine
        self._prepared = prepared
        self._check_thread = check_thread
        self._closed = closed
        self._open = True
        self._closing = threading.Lock()
        self._error: DeviceError | None = None  # touched on the stream's thread only
        self._ended = 0.0  # the same
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def upload(
        self, target: DeviceMemory, target_offset: int, staging: StagingMemory, staging_offset: int, nbytes: int
    ) -> None:
        """Enqueues a copy; it reads its source when its turn has come, not before."""
        self._check()
        check_upload(target, target_offset, staging, staging_offset, nbytes)
        if nbytes:
            source = DeviceMemory(staging.address + staging_offset, nbytes)
            copy = self._engine.accept(target.part(target_offset, nbytes), source)
            self._work.put(partial(self._copy, copy))

    def decode(self, type: GGMLType, dtype: DType, source: DeviceMemory, target: DeviceMemory) -> None:  # noqa: A002
        """Enqueues the host's own kernel."""
        self._check()
        check_decode(type, dtype, source, target)
        if (type, dtype) not in self._prepared:
            raise DeviceError(
                f"{self._engine.device}: no kernel was prepared for {type.name} to {dtype}", device=self._engine.device
            )
        if source.nbytes:
            work = Work(source, target)
            self._engine.begin(work)
            self._work.put(partial(self._decode, type, dtype, work))

    def wait(self, event: Event) -> None:
        """Has the thread sleep until an event has passed."""
        self._check()
        if not isinstance(event, HostEvent | NativeHostEvent):
            raise DeviceError(
                f"{self._engine.device}: {event!r} is no event of a host stream", device=self._engine.device
            )
        self._work.put(event.wait)

    def record(self, *, timing: bool = False) -> HostEvent:  # noqa: ARG002 - every event takes the time
        """Records an event."""
        self._check()
        event = HostEvent()
        self._work.put(partial(self._pass, event))
        return event

    def call(self, function: Callable[[], object]) -> None:
        """Enqueues a function that stands for a kernel, for tests; it must not raise."""
        self._check()
        self._work.put(function)

    def hold(self) -> Hold:
        """Enqueues work that lasts until it is told to end, for tests that need a stream to be late."""
        held = Hold()
        self._work.put(held.wait)
        return held

    def mark(self) -> threading.Event:
        """An event that is set when all work enqueued so far has ended, however it ended."""
        mark = threading.Event()
        self._work.put(mark.set)
        return mark

    def close(self) -> None:
        """Waits for the work and ends the thread. Raises the failure after which nothing works, if there was one."""
        with self._closing:
            if not self._open:
                return
            self._open = False
            self.mark().wait()
            self._closed(self)  # only now: a barrier must find the stream as long as it has work
            self._work.put(None)
            self._thread.join()
        if self._engine.lost is not None:
            raise self._engine.lost

    def _check(self) -> None:
        self._check_thread()
        if not self._open:
            raise DeviceError(f"{self._engine.device}: the stream is closed", device=self._engine.device)
        if self._engine.lost is not None:
            raise self._engine.lost

    def _run(self) -> None:
        lower_priority(_NICE)
        while (work := self._work.get()) is not None:
            work()

    def _copy(self, copy: _Copy) -> None:
        try:
            self._ended = self._engine.perform(copy, self._ended)
        except DeviceError as error:
            self._error = self._error or error

    def _decode(self, type: GGMLType, dtype: DType, work: Work) -> None:  # noqa: A002
        try:
            decode(type, dtype, _view(work.source), _view(work.target))
        except Exception as error:  # noqa: BLE001 - the stream goes on, and the next event tells
            self._error = self._error or DeviceError(f"{self._engine.device}: {error}", device=self._engine.device)
        finally:
            self._engine.end(work)

    def _pass(self, event: HostEvent) -> None:
        error, self._error = self._error, None
        event.finish(error or self._engine.lost)


def _view(memory: DeviceMemory) -> memoryview:
    return memoryview((ctypes.c_ubyte * memory.nbytes).from_address(memory.address)).cast("B")


def _sleep_until(moment: float) -> None:
    while (left := moment - time.perf_counter()) > 0:
        time.sleep(left)
