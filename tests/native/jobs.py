"""Jobs of the C++ engine by themselves: a file of tensors, memory to move them to, and the wait for the end."""

from __future__ import annotations

import ctypes
import select
import time
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asyncload.device import HostDevice
from asyncload.gguf import GGMLType
from asyncload.pipeline import Sink
from asyncload.pipeline._native import NativeTransfer
from asyncload.plan import LoadPlan
from asyncload.quant import DType

if TYPE_CHECKING:
    from asyncload_native import Device, Engine, Event, Failure, File, Job

__all__ = [
    "CHUNK",
    "NOWHERE",
    "ON_DEVICE",
    "ON_HOST",
    "Outcome",
    "Ring",
    "Tensors",
    "job_table",
    "open_engine",
    "readable_with_the_lock",
    "until",
    "wait",
]

CHUNK = 64 << 10
NOWHERE, ON_HOST, ON_DEVICE = range(3)  # where a tensor is decoded
PATIENCE = 60.0  # seconds, where waiting longer is a hang


class _PollFd(ctypes.Structure):
    _fields_ = [("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short)]


def readable_with_the_lock(descriptor: int) -> bool:
    """Whether it gets readable within a minute; ``ctypes.PyDLL`` keeps the interpreter lock during its calls."""
    waiting = _PollFd(descriptor, select.POLLIN, 0)
    return bool(ctypes.PyDLL(None).poll(ctypes.byref(waiting), ctypes.c_ulong(1), 60_000) == 1)


def until(condition: Callable[[], bool]) -> None:
    """Waits for something that nothing tells of."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class _Kernels(HostDevice):
    """A device with kernels that nobody calls."""

    def native_kernel(self, type: GGMLType, dtype: DType) -> tuple[int, int]:  # noqa: A002, ARG002 - the protocol's
        """Of nothing."""
        return 1, 1


def _first(*_: object) -> int:
    return 1


def job_table(plan: LoadPlan, skip: Collection[int] = ()) -> Any:
    """What the native engine is told of a plan."""
    backend: Any = SimpleNamespace(device=_Kernels())
    transfer = NativeTransfer(backend, plan, [], Sink(), skip=skip)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("asyncload.pipeline._native.kernel_address", _first)
        return transfer._table()


class Ring:
    """Memory for staging buffers."""

    def __init__(self, nbytes: int) -> None:
        self.memory = np.empty(nbytes, np.uint8)
        self.address: int = self.memory.ctypes.data


@contextmanager
def open_engine(
    device: Device, *, threads: int = 2, buffers: int = 4, retries: int = 3, retry_delay: float = 0.0
) -> Generator[Engine]:
    """An engine with a ring of its own, closed at the end."""
    from asyncload_native import Engine

    ring = Ring(buffers * CHUNK)
    engine = Engine(
        device, ring, CHUNK, threads=threads, buffers=buffers, nice=0, retries=retries, retry_delay=retry_delay
    )
    try:
        yield engine
    finally:
        engine.close()


@dataclass
class Outcome:
    """What a job has told."""

    landed: list[int] = field(default_factory=list[int])
    moved: int = 0
    polls: int = 0
    ended: bool = False
    failure: Failure | None = None

    def hear(self, job: Job) -> None:
        """Takes its news."""
        news = job.poll()
        self.polls += 1
        self.landed += news.landed
        self.moved += news.moved
        self.ended = news.ended
        self.failure = news.failure


def wait(job: Job) -> Outcome:
    """Waits for a job's end."""
    outcome = Outcome()
    poll = select.poll()
    poll.register(job.descriptor, select.POLLIN)
    while not outcome.ended:
        assert poll.poll(PATIENCE * 1000), "the job does not end"
        outcome.hear(job)
    return outcome


class Tensors:
    """A file of random bytes: one tensor of each size, in blocks of a byte each.

    What is decoded becomes twice as long, by a kernel such as ``StubCuda.double``.
    """

    def __init__(self, path: Path, sizes: Sequence[int], *, seed: int = 0) -> None:
        self.path = path
        self.sizes = sizes
        self.offsets = [int(sum(sizes[:index])) for index in range(len(sizes))]
        self.data = np.random.default_rng(seed).integers(0, 256, sum(sizes), np.uint8)
        path.write_bytes(self.data.tobytes())

    def holds(self, tensor: int, offset: int | None) -> bool:
        """Whether a place in the file is a tensor's."""
        begin = self.offsets[tensor]
        return offset is not None and begin <= offset < begin + self.sizes[tensor]

    def open(self) -> File:
        """The file."""
        from asyncload_native import File

        return File.open(bytes(self.path), 0)[0]

    def job(
        self,
        file: File,
        *,
        decode: int = NOWHERE,
        kernel: int = 0,
        wake: str = "END",
        skip: Sequence[int] = (),
        timed: bool = False,
        ahead: bool = False,
    ) -> Job:
        """A job that moves all of them, or that decodes all of them at one place."""
        from asyncload_native import Job, Wake

        growth = 1 if decode == NOWHERE else 2
        rows = [
            (0, offset, nbytes, growth * nbytes, decode, 1, growth, kernel, 1, index in skip)
            for index, (offset, nbytes) in enumerate(zip(self.offsets, self.sizes, strict=True))
        ]
        table = np.array(rows, np.uint64).reshape(-1, 10)
        return Job([file], table, CHUNK, 0, Wake[wake], to_host=False, timed=timed, ahead=ahead)

    def start(
        self,
        engine: Engine,
        job: Job,
        targets: Sequence[int],
        *,
        scratch: Sequence[int] = (),
        after: Sequence[Event] = (),
        ahead: bool = False,
    ) -> None:
        """Has it moved to these addresses, or ``ahead`` of that read first."""
        engine.submit(job, scratch, after)
        if ahead:
            until(lambda: job.times().read_nbytes > 0)
        engine.admit(job, max(job.groups, default=-1) + 1, 0, np.array(targets, np.uint64))

    def wanted(self, index: int, decode: int = NOWHERE) -> bytes:
        """What a tensor is where it has been moved to."""
        packed = self.data[self.offsets[index] :][: self.sizes[index]]
        return (packed if decode == NOWHERE else np.repeat(packed, 2)).tobytes()
