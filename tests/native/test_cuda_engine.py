"""The engine's way through the CUDA driver, on the stand-in: what arrives, what fails, what must not be freed yet."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.native.cuda_loads import BUFFERS, CHUNK, SIZES, Loads, ended, failure_of
from tests.native.jobs import until
from tests.native.stub_cuda import StubCuda

if TYPE_CHECKING:
    from asyncload_native import Engine

pytestmark = pytest.mark.native

INVALID_VALUE, OUT_OF_MEMORY, LAUNCH_FAILED, UNKNOWN = 1, 2, 719, 999
HostKernel = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_ssize_t, ctypes.c_ssize_t, ctypes.c_ssize_t)


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
    if function == "cuMemcpyHtoDAsync_v2" and loads.cuda.combines:
        loads.cuda.fail("cuMemcpyBatchAsync", LAUNCH_FAILED, lasting=True)
    loads.cuda.fail(function, LAUNCH_FAILED, nth=nth)
    job, _ = loads.begin(engine)
    assert failure_of(job).code == "CUDA_ERROR_LAUNCH_FAILED"


def test_a_job_that_is_cancelled_ends_behind_its_copies(loads: Loads, engine: Engine) -> None:
    loads.cuda.hold(True)
    job, targets = loads.begin(engine)
    if loads.cuda.combines:
        until(lambda: loads.cuda.calls("upload") >= BUFFERS - 1)  # one may wait, to go with others
    else:
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
    failure = failure_of(job)
    assert failure.code
    assert function in failure.what
    for address in targets:  # which is a violation under work
        assert loads.cuda.call("cuMemFree_v2", address) == 0


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        ("cuMemcpyHtoDAsync_v2", "COPY"),
        ("cuEventQuery", "COPY"),  # of work that copies are among
        ("cuLaunchKernel", "DEVICE"),
        ("cuEventRecord", "DEVICE"),
        ("cuStreamWaitEvent", "DEVICE"),
        ("cuCtxSetCurrent", "DEVICE"),
    ],
)
def test_the_failure_of_a_copy_is_told_from_others(loads: Loads, engine: Engine, function: str, kind: str) -> None:
    kernel = loads.cuda.kernel(loads.cuda.double, blocks_per_group=1), 1
    event = loads.cuda.make("cuEventCreate", 2)
    loads.cuda.fail(function, UNKNOWN)
    failure = failure_of(loads.begin(engine, sizes=[1000], kernel=kernel, after=[loads.device.adopt_event(event)])[0])
    assert function in failure.what
    assert failure.kind.name == kind
    assert loads.cuda.call("cuEventDestroy_v2", event) == 0


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
    arguments = (ctypes.c_uint64 * 3)(*loads.scratch[:2], 1)
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


def test_a_load_and_a_capture_do_not_end_each_other(loads: Loads, engine: Engine) -> None:
    with loads.cuda.capturing():
        job, targets = loads.begin(engine)
        assert ended(job)
    assert job.poll().failure is None
    assert loads.arrived(targets)


def test_nor_do_memory_and_a_capture(loads: Loads) -> None:
    found: list[object] = []

    def work() -> None:
        addresses = loads.device.allocate([1000, 2000])
        found.append(loads.device.free(addresses))

    thread = threading.Thread(target=work)
    with loads.cuda.capturing():
        thread.start()
        thread.join()
    assert found == [[0, 0]]


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
    "cuThreadExchangeStreamCaptureMode",
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
NOT_ALWAYS = {  # where nothing is decoded, or nothing waited for
    "plain": {"cuStreamWaitEvent", "cuMemcpyHtoDAsync_v2", "cuLaunchKernel"},
    "decoded": {"cuStreamWaitEvent", "cuMemcpyHtoDAsync_v2"},
}
CLOSING = {
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuThreadExchangeStreamCaptureMode",
    "cuStreamSynchronize",
}  # also where it is


def count_live(cuda: StubCuda) -> int:
    return sum(cuda.live(what) for what in ("contexts", "streams", "events"))


def load_once(loads: Loads, before: int, how: str) -> list[str]:
    """A device, an engine and a load, each ended; the errors on the way."""
    from asyncload_native import CudaDevice, CudaError, Driver

    kernel = None if how == "plain" else (loads.cuda.kernel(loads.cuda.double, blocks_per_group=7), 7)
    targets: list[int] = []
    errors: list[str] = []
    try:
        loads.device = CudaDevice(Driver(loads.cuda.path), 0)
        engine = loads.make_engine()
        after = [loads.device.adopt_event(before)] if how in ("waiting", "timed") else []
        job, targets = loads.begin(engine, kernel=kernel, after=after, sizes=SIZES[:3], timed=how == "timed")
        assert ended(job)
        if (failure := job.poll().failure) is not None:
            errors.append(failure.what)
        engine.close()
    except CudaError as error:
        errors.append(str(error))
    for address in targets:  # which is a violation under work
        assert loads.cuda.call("cuMemFree_v2", address) == 0
    return errors


@pytest.mark.parametrize(
    ("function", "how"),
    [
        (function, how)
        for function in DRIVER_CALLS
        for how in ("plain", "decoded", "waiting", "timed")
        if function not in NOT_ALWAYS.get(how, ())
    ],
)
def test_whichever_call_of_a_load_fails(loads: Loads, function: str, how: str) -> None:
    """Each call of a function once: the error names it, and nothing is left."""
    cuda = loads.cuda
    del loads.device
    before = cuda.make("cuEventCreate", 2)
    struck, nth = True, 0
    while struck:
        nth += 1
        calls, live = cuda.calls(function), count_live(cuda)
        cuda.fail(function, UNKNOWN, nth=nth)
        errors = load_once(loads, before, how)
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
