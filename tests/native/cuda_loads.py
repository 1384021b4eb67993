"""Loads by the engine through the CUDA driver, on the stand-in: a file, memory for tensors, the wait for the end."""

from __future__ import annotations

import ctypes
import errno
import mmap
import random
import select
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tests.native.stub_cuda import StubCuda

if TYPE_CHECKING:
    from asyncload_native import CudaDevice, Engine, Event, Failure, Job

__all__ = ["BUFFERS", "CHUNK", "SIZES", "THREADS", "Loads", "ended", "failure_of"]

CHUNK = 64 << 10
THREADS, BUFFERS, MOST_BUFFERS = 2, 4, 16
SIZES = (200_000, 100, 1, 1_000_000, 3 * CHUNK)
NONE, DEVICE = 0, 2


class Loads:
    """An engine on the stand-in, a file, and device memory for its tensors."""

    def __init__(self, cuda: StubCuda, path: Path) -> None:
        from asyncload_native import CudaDevice, Driver

        cuda.attach()
        self.cuda = cuda
        self.content = random.Random(1).randbytes(sum(SIZES))
        path.write_bytes(self.content)
        self.path = path
        self.ring = mmap.mmap(-1, MOST_BUFFERS * CHUNK)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.ring))
        assert cuda.call("cuMemHostRegister_v2", self.address, MOST_BUFFERS * CHUNK, 0) == 0
        self.device: CudaDevice = CudaDevice(Driver(cuda.path), 0)
        self.scratch = [cuda.make("cuMemAlloc_v2", CHUNK) for _ in range(MOST_BUFFERS)]

    def make_engine(
        self, *, threads: int = THREADS, buffers: int = BUFFERS, retry_delay: float | None = None
    ) -> Engine:
        """On the device, with 16 buffers at most; it reads again after such a delay, if there is one."""
        from asyncload_native import Engine

        retries = 0 if retry_delay is None else 3
        return Engine(
            self.device, self, CHUNK, threads, buffers, nice=0, retries=retries, retry_delay=retry_delay or 0.0
        )

    def begin(
        self,
        engine: Engine,
        *,
        kernel: tuple[int, int] | None = None,
        after: Sequence[Event] = (),
        sizes: Sequence[int] = SIZES,
        timed: bool = False,
        admit: bool = True,
        ahead: bool = False,
        failing: Sequence[int] = (),
    ) -> tuple[Job, list[int]]:
        """Submits the file's tensors; with a kernel, which repeats each block of 32 bytes, decoded on the device."""
        from asyncload_native import File, Job, Wake

        file, _ = File.open(bytes(self.path), 0)
        for number in failing:
            file.fail_read(number, errno.EIO)
        rows: list[tuple[int, ...]] = []
        for size in sizes:
            nbytes = size // 32 * 32 if kernel else size
            offset = sum(SIZES[: len(rows)])
            decode = (DEVICE, 32, 64, *kernel) if kernel else (NONE, 1, 1, 0, 0)
            rows.append((0, offset, nbytes, 2 * nbytes if kernel else nbytes, *decode, 0))
        job = Job([file], np.array(rows, np.uint64), CHUNK, 0, Wake.END, to_host=False, timed=timed, ahead=ahead)
        targets = [self.cuda.make("cuMemAlloc_v2", max(row[3], 1)) for row in rows]
        engine.submit(job, self.scratch if kernel else [], after)
        if admit:
            self.admit(engine, job, targets)
        return job, targets

    def admit(self, engine: Engine, job: Job, targets: Sequence[int]) -> None:
        """Has all of it moved."""
        engine.admit(job, max(job.groups) + 1, 0, np.array(targets, np.uint64))

    def expected(self, index: int) -> bytes:
        """What a tensor holds as it is in the file."""
        offset = sum(SIZES[:index])
        return self.content[offset : offset + SIZES[index]]

    def arrived(self, targets: Sequence[int]) -> bool:
        """Whether all tensors are there."""
        return all(
            ctypes.string_at(address, SIZES[index]) == self.expected(index) for index, address in enumerate(targets)
        )


def ended(job: Job, seconds: float = 30) -> bool:
    """Waits for a job's end, for so long at most."""
    poll = select.poll()
    poll.register(job.descriptor, select.POLLIN)
    return bool(poll.poll(1000 * seconds)) and job.poll().ended


def failure_of(job: Job) -> Failure:
    assert ended(job)
    failure = job.poll().failure
    assert failure is not None
    return failure
