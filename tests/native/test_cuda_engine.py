"""The engine's way through the CUDA driver, on the stand-in: what arrives, what fails, what must not be freed yet."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import select
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.native.jobs import until
from tests.native.stub_cuda import StubCuda

if TYPE_CHECKING:
    from asyncload_native import CudaDevice, Engine, Event, Failure, Job

pytestmark = pytest.mark.native

CHUNK = 64 << 10
THREADS, BUFFERS = 2, 4
SIZES = (200_000, 100, 1, 1_000_000, 3 * CHUNK)
INVALID_VALUE, OUT_OF_MEMORY, LAUNCH_FAILED, UNKNOWN = 1, 2, 719, 999
NONE, DEVICE = 0, 2
HostKernel = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_ssize_t, ctypes.c_ssize_t, ctypes.c_ssize_t)


class Loads:
    """An engine on the stand-in, a file, and device memory for its tensors."""

    def __init__(self, cuda: StubCuda, path: Path) -> None:
        from asyncload_native import CudaDevice, Driver

        cuda.attach()
        self.cuda = cuda
        self.content = random.Random(1).randbytes(sum(SIZES))
        path.write_bytes(self.content)
        self.path = path
        self.ring = mmap.mmap(-1, BUFFERS * CHUNK)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.ring))
        assert cuda.call("cuMemHostRegister_v2", self.address, BUFFERS * CHUNK, 0) == 0
        self.device: CudaDevice = CudaDevice(Driver(cuda.path), 0)
        self.scratch = [cuda.make("cuMemAlloc_v2", CHUNK) for _ in range(THREADS)]

    def make_engine(self, *, buffers: int = BUFFERS, retry_delay: float | None = None) -> Engine:
        """On the device; it reads again after such a delay, if there is one."""
        from asyncload_native import Engine

        retries = 0 if retry_delay is None else 3
        return Engine(
            self.device, self, CHUNK, THREADS, buffers, nice=0, retries=retries, retry_delay=retry_delay or 0.0
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


@pytest.fixture
def loads(stub_cuda: StubCuda, tmp_path: Path) -> Loads:
    return Loads(stub_cuda, tmp_path / "file")


@pytest.fixture
def engine(loads: Loads) -> Iterator[Engine]:
    engine = loads.make_engine()
    yield engine
    loads.cuda.hold(False)
    engine.close()
    assert loads.cuda.live("streams") == 0  # the events are the device's


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


def test_there_is_no_hurry_with_more_memory_while_chunks_wait_for_a_thread(loads: Loads, engine: Engine) -> None:
    from asyncload_native import Admission

    job, targets = loads.begin(engine, admit=False, sizes=SIZES[:1] * 4)
    admission = Admission(engine, job, np.array(targets, np.uint64), range(4))
    loads.cuda.hold(True)
    assert not admission.give(targets[0])
    assert -(-SIZES[0] // CHUNK) == BUFFERS  # all of the first may be on their way, none of the second
    admission.give(targets[1])
    assert admission.give(targets[2])
    loads.cuda.hold(False)
    until(lambda: job.times().uploaded_nbytes == 3 * SIZES[0])
    assert not admission.give(targets[3])
    assert ended(job)


def test_nor_is_there_with_none(loads: Loads, engine: Engine) -> None:
    from asyncload_native import Admission

    job, targets = loads.begin(engine, admit=False, sizes=[1_000_000] * 2)
    admission = Admission(engine, job, np.array(targets, np.uint64), range(2))
    loads.cuda.hold(True)
    assert not admission.give(targets[0])
    assert not admission.give(targets[1])  # although chunks wait: it was the last
    loads.cuda.hold(False)
    assert ended(job)


class TestReadingAhead:
    """Chunks that are read before it is known where they go: each thread has one, and waits with it."""

    @pytest.fixture
    def waiting(self, loads: Loads, engine: Engine) -> tuple[Job, list[int]]:
        """A job with whose chunks all threads wait, and where it goes."""
        job, targets = loads.begin(engine, admit=False, ahead=True)
        until(lambda: job.times().read_nbytes == THREADS * CHUNK)
        return job, targets

    def test_nothing_is_copied_before_it_is_admitted(
        self, loads: Loads, engine: Engine, waiting: tuple[Job, list[int]]
    ) -> None:
        assert loads.cuda.calls("cuMemcpyHtoDAsync_v2") == 0
        loads.admit(engine, *waiting)
        assert ended(waiting[0])
        assert loads.arrived(waiting[1])
        assert waiting[0].times().read_nbytes == sum(SIZES)  # each once

    def test_nor_the_groups_behind_those_admitted(
        self, loads: Loads, engine: Engine, waiting: tuple[Job, list[int]]
    ) -> None:
        job, targets = waiting
        engine.admit(job, 1, 0, np.array(targets[:1], np.uint64))
        until(lambda: job.times().read_nbytes == SIZES[0] + 101 + CHUNK)  # the small ones share a chunk
        until(lambda: job.times().uploaded_nbytes == SIZES[0])
        assert ctypes.string_at(targets[0], SIZES[0]) == loads.expected(0)
        loads.admit(engine, *waiting)
        assert ended(job)
        assert loads.arrived(targets)

    def test_a_job_that_is_cancelled_ends(self, loads: Loads, engine: Engine, waiting: tuple[Job, list[int]]) -> None:
        engine.cancel(waiting[0])
        assert ended(waiting[0])
        assert loads.cuda.calls("cuMemcpyHtoDAsync_v2") == 0

    def test_so_does_one_whose_engine_is_closed(self, engine: Engine, waiting: tuple[Job, list[int]]) -> None:
        engine.close()
        assert ended(waiting[0])

    def test_another_job_has_the_threads_meanwhile(
        self, loads: Loads, engine: Engine, waiting: tuple[Job, list[int]]
    ) -> None:
        other, others_targets = loads.begin(engine, ahead=True)
        assert ended(other)
        assert loads.arrived(others_targets)
        assert waiting[0].times().uploaded_nbytes == 0
        loads.admit(engine, *waiting)
        assert ended(waiting[0])
        assert loads.arrived(waiting[1])

    def test_and_the_first_may_be_cancelled_then(
        self, loads: Loads, engine: Engine, waiting: tuple[Job, list[int]]
    ) -> None:
        loads.cuda.hold(True)
        other, _ = loads.begin(engine)
        until(lambda: other.times().read_nbytes == SIZES[0])  # four chunks, which all wait for their copies
        engine.cancel(waiting[0])
        assert ended(waiting[0])
        loads.cuda.hold(False)
        assert ended(other)

    def test_also_before_a_read_is_made_again(self, loads: Loads) -> None:
        engine = loads.make_engine(retry_delay=3600.0)
        job, targets = loads.begin(engine, admit=False, ahead=True, failing=[1, 2])
        until(lambda: job.times().retries == THREADS)
        other, others_targets = loads.begin(engine, ahead=True)
        assert ended(other)
        assert loads.arrived(others_targets)
        loads.admit(engine, job, targets)
        assert ended(job)
        assert loads.arrived(targets)
        engine.close()

    def test_a_buffer_a_thread_is_enough(self, loads: Loads) -> None:
        engine = loads.make_engine(buffers=THREADS)
        job, targets = loads.begin(engine, admit=False, ahead=True)
        until(lambda: job.times().read_nbytes == THREADS * CHUNK)
        other, others_targets = loads.begin(engine)
        assert ended(other)
        loads.admit(engine, job, targets)
        assert ended(job)
        assert loads.arrived(targets)
        assert loads.arrived(others_targets)
        engine.close()

    def test_copies_are_timed_and_wait_for_what_is_before_them(self, loads: Loads, engine: Engine) -> None:
        before = loads.device.adopt_event(loads.cuda.make("cuEventCreate", 0))
        job, targets = loads.begin(engine, admit=False, ahead=True, timed=True, after=[before])
        until(lambda: job.times().read_nbytes == THREADS * CHUNK)
        loads.admit(engine, job, targets)
        assert ended(job)
        assert loads.arrived(targets)
        assert sum(map(len, job.copies())) == 4 + 1 + 16 + 3

    def test_of_two_that_wait_either_may_be_admitted(
        self, loads: Loads, engine: Engine, waiting: tuple[Job, list[int]]
    ) -> None:
        other, others_targets = loads.begin(engine, admit=False, ahead=True)
        loads.admit(engine, other, others_targets)
        assert ended(other)
        assert loads.arrived(others_targets)
        engine.cancel(waiting[0])
        assert ended(waiting[0])

    def test_a_read_that_fails_ends_the_job(self, loads: Loads, engine: Engine) -> None:
        os.truncate(loads.path, CHUNK)
        job, _ = loads.begin(engine, admit=False, ahead=True)
        assert failure_of(job).tensor == 0


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("known", [(), (0,), (1, 3), (len(SIZES) - 1,)])
def test_tensors_are_moved_as_they_are_allocated(
    loads: Loads, engine: Engine, known: Sequence[int], ahead: bool
) -> None:
    from asyncload_native import Admission

    job, targets = loads.begin(engine, admit=False, ahead=ahead)
    awaited = [index for index in range(len(SIZES)) if index not in known]
    admission = Admission(engine, job, np.array(targets, np.uint64), awaited)
    fitting = len(awaited) - 1
    loads.cuda.fail("cuMemAlloc_v2", OUT_OF_MEMORY, nth=fitting + 1)
    first = loads.device.allocate_some([SIZES[index] for index in awaited], admission)
    assert len(first) == fitting
    until(lambda: job.times().uploaded_nbytes > 0)  # while the last has no memory yet
    with pytest.raises(IndexError):
        Admission(engine, job, np.array(targets, np.uint64), awaited[::-1])
    last = loads.device.allocate([SIZES[awaited[-1]]])
    admission.give(last[0])
    assert admission.admitted == len(SIZES)
    with pytest.raises(IndexError):
        admission.give(last[0])
    assert ended(job)
    assert job.poll().failure is None
    for index, address in zip(awaited, first + last, strict=True):
        targets[index] = address
    for index, (address, size) in enumerate(zip(targets, SIZES, strict=True)):
        assert ctypes.string_at(address, size) == loads.expected(index)
    assert loads.device.free([*first, *last, 1]) == [0] * len(awaited) + [INVALID_VALUE]


@pytest.mark.parametrize("timed", [False, True])
def test_bytes_arrive(loads: Loads, engine: Engine, timed: bool) -> None:
    job, targets = loads.begin(engine, timed=timed)
    assert ended(job)
    assert job.poll().failure is None
    assert loads.cuda.calls("cuEventSynchronize") == 0  # no interrupt for each chunk
    assert loads.arrived(targets)


def test_what_the_device_decodes_is_whole(loads: Loads, engine: Engine) -> None:
    def repeat(source: int, target: int, count: int) -> int:
        for block in range(count):
            ctypes.memmove(target + 64 * block, ctypes.string_at(source + 32 * block, 32) * 2, 64)
        return 1

    function = HostKernel(repeat)
    kernel = loads.cuda.kernel(ctypes.cast(function, ctypes.c_void_p).value or 0, blocks_per_group=7)
    job, targets = loads.begin(engine, kernel=(kernel, 7))
    assert ended(job)
    assert job.poll().failure is None
    for index, (address, size) in enumerate(zip(targets, SIZES, strict=True)):
        nbytes = size // 32 * 32
        found = np.frombuffer(ctypes.string_at(address, 2 * nbytes), np.uint8).reshape(-1, 2, 32)
        packed = np.frombuffer(loads.expected(index)[:nbytes], np.uint8).reshape(-1, 1, 32)
        assert np.array_equal(found, np.broadcast_to(packed, found.shape))


@pytest.mark.parametrize("function", ["cuMemcpyHtoDAsync_v2", "cuEventRecord", "cuEventQuery", "work"])
@pytest.mark.parametrize("nth", [1, 2, 5])
def test_a_failure_of_the_driver_ends_the_job_with_its_name(
    loads: Loads, engine: Engine, function: str, nth: int
) -> None:
    loads.cuda.fail(function, LAUNCH_FAILED, nth=nth)
    job, _ = loads.begin(engine)
    assert failure_of(job).code == "CUDA_ERROR_LAUNCH_FAILED"


def test_a_job_that_is_cancelled_ends_behind_its_copies(loads: Loads, engine: Engine) -> None:
    loads.cuda.hold(True)
    job, targets = loads.begin(engine)
    until(lambda: loads.cuda.calls("cuEventRecord") == BUFFERS)
    engine.cancel(job)
    assert not ended(job, 0.1)
    loads.cuda.hold(False)
    assert ended(job)
    for address in targets:  # which is a violation under work
        assert loads.cuda.call("cuMemFree_v2", address) == 0


@pytest.mark.parametrize("function", ["cuEventRecord", "cuEventQuery"])
def test_a_job_whose_event_fails_ends_behind_its_copies(loads: Loads, engine: Engine, function: str) -> None:
    loads.cuda.hold(True)
    loads.cuda.fail(function, UNKNOWN)
    job, targets = loads.begin(engine, sizes=[1000])
    assert not ended(job, 0.3)
    loads.cuda.hold(False)
    assert failure_of(job).code
    for address in targets:
        assert loads.cuda.call("cuMemFree_v2", address) == 0


def test_a_thread_that_cannot_attach_is_a_failure_of_what_it_takes(loads: Loads, engine: Engine) -> None:
    loads.cuda.fail("cuCtxSetCurrent", UNKNOWN)
    job, _ = loads.begin(engine, sizes=[1000])
    assert "cuCtxSetCurrent" in failure_of(job).what
    job, targets = loads.begin(engine, sizes=[1000])  # it tries again
    assert ended(job)
    assert ctypes.string_at(targets[0], 1000) == loads.content[:1000]


def test_copies_wait_on_the_device_for_what_is_before_them(loads: Loads, engine: Engine) -> None:
    go = threading.Event()

    def wait(*_: int) -> int:
        return int(go.wait(30))

    function = HostKernel(wait)
    kernel = loads.cuda.kernel(ctypes.cast(function, ctypes.c_void_p).value or 0, blocks_per_group=1)
    stream, event = loads.cuda.make("cuStreamCreate", 0), loads.cuda.make("cuEventCreate", 2)
    arguments = (ctypes.c_uint64 * 3)(*loads.scratch, 1)
    each = (ctypes.c_void_p * 3)(*(ctypes.addressof(arguments) + 8 * index for index in range(3)))
    assert loads.cuda.call("cuLaunchKernel", kernel, 1, 1, 1, 1, 1, 1, 0, stream, ctypes.byref(each), 0) == 0
    loads.cuda.call("cuEventRecord", event, stream)
    job, targets = loads.begin(engine, after=[loads.device.adopt_event(event)])
    until(lambda: loads.cuda.calls("cuEventRecord") == 1 + BUFFERS)
    assert ctypes.string_at(targets[0], 16) == b"\xa5" * 16
    go.set()
    assert ended(job)
    assert ctypes.string_at(targets[0], SIZES[0]) == loads.expected(0)
    loads.cuda.call("cuEventDestroy_v2", event)
    loads.cuda.call("cuStreamDestroy_v2", stream)


@pytest.mark.parametrize(
    ("function", "nth"), [("cuStreamCreate", 1), ("cuStreamCreate", 2), ("cuEventCreate", 1), ("cuEventCreate", 4)]
)
def test_an_engine_that_cannot_be_made_leaves_nothing(loads: Loads, function: str, nth: int) -> None:
    from asyncload_native import CudaError

    loads.cuda.fail(function, OUT_OF_MEMORY, nth=nth)
    with pytest.raises(CudaError, match=function) as caught:
        loads.make_engine()
    assert caught.value.name == "CUDA_ERROR_OUT_OF_MEMORY"
    assert loads.cuda.live("streams") == 0
    del loads.device  # which has the events that nobody holds
    assert (loads.cuda.live("contexts"), loads.cuda.live("events")) == (1, 0)  # the test's own context


DRIVER_CALLS = (
    "cuInit",
    "cuDeviceGet",
    "cuDevicePrimaryCtxRetain",
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuStreamCreate",
    "cuStreamWaitEvent",
    "cuStreamSynchronize",
    "cuStreamDestroy_v2",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventQuery",
    "cuEventDestroy_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuLaunchKernel",
    "cuDevicePrimaryCtxRelease_v2",
)


QUIET = {"cuStreamDestroy_v2", "cuEventDestroy_v2", "cuDevicePrimaryCtxRelease_v2"}  # it is too late for an error
CLOSING = {"cuCtxGetCurrent", "cuCtxSetCurrent", "cuStreamSynchronize"}  # also where it is


def count_live(cuda: StubCuda) -> int:
    return sum(cuda.live(what) for what in ("contexts", "streams", "events"))


def load_once(loads: Loads, before: int, *, timed: bool) -> list[str]:
    """A device, an engine and a load, each ended; the errors on the way."""
    from asyncload_native import CudaDevice, CudaError, Driver

    kernel = loads.cuda.kernel(loads.cuda.double, blocks_per_group=7), 7
    targets: list[int] = []
    errors: list[str] = []
    try:
        loads.device = CudaDevice(Driver(loads.cuda.path), 0)
        engine = loads.make_engine()
        after = [loads.device.adopt_event(before)]
        job, targets = loads.begin(engine, kernel=kernel, after=after, sizes=SIZES[:3], timed=timed)
        assert ended(job)
        if (failure := job.poll().failure) is not None:
            errors.append(failure.what)
        engine.close()
    except CudaError as error:
        errors.append(str(error))
    for address in targets:  # which is a violation under work
        assert loads.cuda.call("cuMemFree_v2", address) == 0
    return errors


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("function", DRIVER_CALLS)
def test_whichever_call_of_a_load_fails(loads: Loads, function: str, timed: bool) -> None:
    """Each call of a function once: the error names it, and nothing is left."""
    cuda = loads.cuda
    del loads.device
    before = cuda.make("cuEventCreate", 2)
    struck, nth = True, 0
    while struck:
        nth += 1
        calls, live = cuda.calls(function), count_live(cuda)
        cuda.fail(function, UNKNOWN, nth=nth)
        errors = load_once(loads, before, timed=timed)
        loads.__dict__.pop("device", None)
        struck = cuda.calls(function) - calls >= nth
        assert count_live(cuda) - live == int(struck and function in QUIET)
        assert all(function in error for error in errors)
        assert len(errors) == int(struck) or function in QUIET | CLOSING
    assert nth > 1
    cuda.fail(function, 0, nth=1 << 30)


def test_the_context_is_given_back_with_the_device(loads: Loads) -> None:
    retained = loads.cuda.live("contexts")
    loads.make_engine().close()
    del loads.device
    assert loads.cuda.live("contexts") == retained - 1
