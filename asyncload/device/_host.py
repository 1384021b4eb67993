"""The host device: real memory, a thread a stream, and everything that makes races and overlap show in tests.

It holds its callers to what the contract asks of them: memory that enqueued copies still use is not freed, closed or
discarded, and a thread attaches before it uses a stream; each breach is a ``DeviceError`` here, where a GPU would read
or write whatever lies there by then.
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading
import weakref
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from itertools import accumulate
from typing import Any

from asyncload.device._contract import (
    DeviceInfo,
    DeviceMemory,
    Event,
    MemoryInfo,
    Recipient,
    Residency,
    check_download,
)
from asyncload.device._host_stream import CopyEngine, Hold, HostStream, NativeHostEvent, PassedAll
from asyncload.device._pages import Mapping, Pages, unmap
from asyncload.device._several import allocate_each, allocate_until, free_each
from asyncload.errors import DeviceError, OutOfDeviceMemoryError
from asyncload.gguf import GGMLType
from asyncload.quant import DType, kernel_address, prepare

__all__ = ["HostDevice", "HostStaging"]

POISON = 0xA5
_QUARANTINE = 64 << 20  # bytes of freed memory that stay mapped, poisoned, so that a late reader finds the poison
_NAME = "host"


class HostStaging:
    """Staging memory of a host device."""

    def __init__(self, pages: Pages, engine: CopyEngine, *, poison: bool) -> None:
        self._pages: Pages | None = pages
        self._engine = engine
        self._poison = poison
        self.view = pages.view
        self.address = pages.address
        self.nbytes = pages.nbytes

    def discard(self, offset: int, nbytes: int) -> None:
        """Poisons a range, if the device poisons; raises ``DeviceError`` if a copy still reads it."""
        self._engine.check_unused("staging memory was discarded", self.address + offset, nbytes)
        if self._poison and self._pages is not None:
            self._pages.fill(POISON, offset, nbytes)

    def close(self) -> None:
        """Unmaps the memory, poisoned; raises ``DeviceError`` if a copy still reads it."""
        self.discard(0, self.nbytes)
        pages, self._pages = self._pages, None
        if pages is not None:
            pages.close()


class _OfThread(threading.local):
    """Whether a thread has attached, what it allocates from, and what it has freed; the latter two at once."""

    attached = False
    mapping: Mapping | None = None
    freed: list[DeviceMemory] | None = None


def _unmap_all(allocated: dict[int, int], quarantine: Iterable[DeviceMemory]) -> None:
    """Gives back what a device leaves behind."""
    unmap([*allocated.items(), *((kept.address, kept.nbytes) for kept in quarantine)])


class HostDevice:
    """Host memory as a device.

    ``bandwidth`` in bytes a second is that of one copy engine for all streams (None: memory's own) and ``latency`` in
    seconds passes before each copy; both may be set later. ``total_bytes`` is how much can be allocated (None: the
    machine's memory). With ``poison``, freed device memory, discarded or closed staging memory, and a copy's target
    before the copy, are overwritten with 0xA5. ``on_allocate``, which may be set later, is called with the size before
    each allocation and may raise. Streams decode with the host's kernels.
    """

    def __init__(
        self,
        *,
        bandwidth: float | None = None,
        latency: float = 0.0,
        total_bytes: int | None = None,
        poison: bool = False,
        on_allocate: Callable[[int], None] | None = None,
    ) -> None:
        if total_bytes is None:
            total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        model = f"host memory, {platform.machine()}"
        self._info = DeviceInfo(
            name=_NAME, kind="host", index=0, model=model, total_bytes=total_bytes, needs_stream=False
        )
        self._engine = CopyEngine(_NAME, bandwidth, latency, POISON if poison else None)
        self._poison = poison
        self.on_allocate = on_allocate
        self._lock = threading.Lock()
        self._allocated: dict[int, int] = {}
        self._used = 0
        self._quarantine: deque[DeviceMemory] = deque()
        weakref.finalize(self, _unmap_all, self._allocated, self._quarantine).atexit = False
        self._streams: set[HostStream] = set()
        self._opened = 0
        self._held: list[Hold] = []
        self._prepared: set[tuple[GGMLType, DType]] = set()
        self._thread = _OfThread()
        self.attach()

    @property
    def info(self) -> DeviceInfo:
        """What it is."""
        return self._info

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second of all streams together, or None for memory's own speed."""
        return self._engine.bandwidth

    @bandwidth.setter
    def bandwidth(self, value: float | None) -> None:
        self._engine.bandwidth = value
        self._pace_native()

    @property
    def latency(self) -> float:
        """Seconds that pass before each copy of a stream."""
        return self._engine.latency

    @latency.setter
    def latency(self, value: float) -> None:
        self._engine.latency = value
        self._pace_native()

    def attach(self) -> None:
        """Notes that the calling thread may use streams."""
        self._thread.attached = True

    def _check_thread(self) -> None:
        if not self._thread.attached:
            name = threading.current_thread().name
            raise DeviceError(f"{_NAME}: thread {name} uses a stream and has not attached", device=_NAME)

    # Memory

    def allocate(self, nbytes: int) -> DeviceMemory:
        """Maps memory that is filled with zeros."""
        if self.on_allocate is not None:
            self.on_allocate(nbytes)
        if nbytes == 0:
            return DeviceMemory(0, 0)
        with self._lock:  # taken before it is mapped, so that two threads cannot share the last bytes
            free = self._info.total_bytes - self._used
            if nbytes > free:
                raise self._out_of_memory(nbytes, free)
            self._used += nbytes
        try:
            memory = DeviceMemory((self._thread.mapping or Mapping()).take(nbytes), nbytes)
        except MemoryError as error:
            with self._lock:
                self._used -= nbytes
            raise self._out_of_memory(nbytes, free) from error
        with self._lock:
            self._allocated[memory.address] = nbytes
        return memory

    def allocate_all(self, sizes: Sequence[int]) -> list[DeviceMemory]:
        """Each by ``allocate``, but all mapped at once."""
        with self._mapped_at_once(sizes):
            return allocate_each(sizes, self.allocate, self.free)

    def allocate_some(self, sizes: Sequence[int], recipient: Recipient) -> list[DeviceMemory]:
        """Each by ``allocate``, but all mapped at once."""
        with self._mapped_at_once(sizes):
            return allocate_until(sizes, self.allocate, recipient)

    @contextmanager
    def _mapped_at_once(self, sizes: Sequence[int]) -> Generator[None]:
        """Has ``allocate`` take from one mapping, for as many of the sizes as there seems to be memory for."""
        mapping = Mapping(sizes[: bisect_right([*accumulate(sizes)], self.memory().free)])
        self._thread.mapping = mapping
        try:
            yield
        finally:
            self._thread.mapping = None
            mapping.close()

    def _out_of_memory(self, nbytes: int, free: int) -> OutOfDeviceMemoryError:
        return OutOfDeviceMemoryError(
            f"{_NAME}: {nbytes} bytes needed, {free} free", device=_NAME, needed=nbytes, available=free, breakdown={}
        )

    def free(self, memory: DeviceMemory) -> None:
        """Unmaps memory; raises ``DeviceError`` also if a copy still writes it."""
        if memory.address == memory.nbytes == 0:
            return
        with self._lock:
            if self._allocated.get(memory.address) != memory.nbytes:
                raise DeviceError(f"{_NAME}: {memory} is not allocated", device=_NAME)
            self._engine.check_unused("device memory was freed", memory.address, memory.nbytes)
            del self._allocated[memory.address]
        freed = self._thread.freed
        if freed is None:
            self._unmap([memory])
        else:
            freed.append(memory)

    def free_all(self, memory: Collection[DeviceMemory]) -> dict[DeviceMemory, Exception]:
        """Each by ``free``, but all unmapped at once."""
        self._thread.freed = freed = list[DeviceMemory]()
        try:
            return free_each(memory, self.free)
        finally:
            self._thread.freed = None
            self._unmap(freed)

    def _unmap(self, memory: Sequence[DeviceMemory]) -> None:
        """Unmaps memory that nobody has any more, or keeps it poisoned for a while."""
        leaving = self._poisoned(memory) if self._poison else memory
        unmap((each.address, each.nbytes) for each in leaving)
        with self._lock:  # what is mapped is not free
            self._used -= sum(each.nbytes for each in memory)

    def _poisoned(self, memory: Sequence[DeviceMemory]) -> list[DeviceMemory]:
        """Poisons memory, and takes it in exchange for what was kept for long enough."""
        for each in memory:
            ctypes.memset(each.address, POISON, each.nbytes)
        leaving: list[DeviceMemory] = []
        with self._lock:
            self._quarantine.extend(memory)
            while sum(kept.nbytes for kept in self._quarantine) > _QUARANTINE:
                leaving.append(self._quarantine.popleft())
        return leaving

    def staging(self, nbytes: int) -> HostStaging:
        """Maps and touches memory."""
        try:
            pages = Pages(nbytes)
        except MemoryError as error:
            raise DeviceError(f"{_NAME}: no staging memory: {error}", device=_NAME) from error
        pages.touch()
        return HostStaging(pages, self._engine, poison=self._poison)

    def download(self, memory: DeviceMemory, offset: int, buffer: memoryview) -> None:
        """Copies at once."""
        check_download(memory, offset, buffer.nbytes)
        if buffer.nbytes:
            target = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
            ctypes.memmove(target, memory.address + offset, buffer.nbytes)

    def memory(self) -> MemoryInfo:
        """What is not allocated from this device counts as free, whatever the machine does beside it."""
        with self._lock:
            return MemoryInfo(self._info.total_bytes - self._used, self._info.total_bytes)

    def process_memory(self) -> int | None:
        """There is no driver that would tell."""
        return None

    def residency(self, memory: DeviceMemory) -> Residency:
        """The device's own is what was allocated from it; it knows of nothing else."""
        begin, end = memory.address, memory.address + memory.nbytes
        with self._lock:
            inside = any(address <= begin < end <= address + nbytes for address, nbytes in self._allocated.items())
        return Residency.DEVICE if inside else Residency.UNKNOWN

    # Work

    def prepare(self, pairs: Collection[tuple[GGMLType, DType]]) -> None:
        """Prepares the host's kernels, with which streams decode."""
        prepare(pairs)
        self._prepared.update(pairs)

    def stream(self) -> HostStream:
        """Starts a stream's thread."""
        with self._lock:
            stream = HostStream(
                self._engine,
                f"asyncload-host-stream{self._opened}",
                prepared=self._prepared,
                check_thread=self._check_thread,
                closed=self._forget,
            )
            self._opened += 1
            self._streams.add(stream)
        return stream

    def _forget(self, stream: HostStream) -> None:
        with self._lock:
            self._streams.discard(stream)

    def adopt(self, stream: object) -> HostStream:
        """Takes no streams but its own."""
        if not isinstance(stream, HostStream):
            raise DeviceError(f"{_NAME}: {type(stream).__name__} is no stream of a host device", device=_NAME)
        self.attach()
        return stream

    def barrier(self) -> PassedAll:
        """Passes after the work of all streams and of whoever holds the device."""
        with self._lock:
            self._held = [held for held in self._held if not held.is_set()]
            return PassedAll([*(stream.mark() for stream in self._streams), *self._held])

    def native(self) -> Any:
        """The same device for C++ threads: their copies are slowed, poisoned and made to fail like those of streams."""
        with self._lock:
            if self._engine.native is None:
                self._engine.native = import_module("asyncload_native").HostDevice()
                self._pace_native()
                for number in self._engine.failing():
                    self._engine.native.fail_copy(number)
            return self._engine.native

    def _pace_native(self) -> None:
        if self._engine.native is not None:
            self._engine.native.set_pace(self.bandwidth or 0.0, self.latency, poison=self._poison)

    def from_native(self, event: Any) -> NativeHostEvent:
        """An event of a C++ thread's, for streams and for whoever waits."""
        return NativeHostEvent(event)

    def to_native(self, event: Event) -> Any:
        """An event for C++ threads to wait for; None for one of a stream here, for which they cannot."""
        return event.native if isinstance(event, NativeHostEvent) else None

    def native_kernel(self, type: GGMLType, dtype: DType) -> tuple[int, int]:  # noqa: A002 - the field's name
        """The host's kernel."""
        return kernel_address(type, dtype), 1

    def close(self) -> None:
        """Closes streams that are still open."""
        with self._lock:
            streams = list(self._streams)
        with ExitStack() as stack:
            for stream in streams:
                stack.callback(stream.close)

    # For tests

    def hold(self) -> Hold:
        """Stands for another library's work on the device: enqueued now, and lasting until it is told to end."""
        held = Hold()
        with self._lock:
            self._held.append(held)
        return held

    def fail_upload(self, number: int, *, refused: bool = False, lasting: bool = False) -> None:
        """Makes the ``number``-th copy from now on (1 is the next) fail, once.

        Its stream's next event raises ``CopyError``, or, if it is to be ``refused``, the call of ``upload`` does. If it
        is ``lasting``, as a GPU's errors are, so do all events that pass and all calls of streams from then on.
        """
        self._engine.fail(number, refused=refused, lasting=lasting)
        if self._engine.native is not None:
            self._engine.native.fail_copy(number)
