"""Copies of several threads that go to the device together, on a stand-in for a driver that combines copies."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.native.cuda_loads import CHUNK, MOST_BUFFERS, SIZES, THREADS, Loads, ended, failure_of
from tests.native.jobs import until

if TYPE_CHECKING:
    from asyncload_native import Engine, Job

pytestmark = [pytest.mark.native, pytest.mark.parametrize("loads", ["libstub_cuda.so"], indirect=True)]

UNKNOWN = 999
UNDER_WAY = 3  # batches, at most
N_CHUNKS = 4 + 1 + 16 + 3


@pytest.fixture
def engine(loads: Loads) -> Iterator[Engine]:
    """One with as many buffers as there are."""
    engine = loads.make_engine(threads=MOST_BUFFERS // 2, buffers=MOST_BUFFERS)
    yield engine
    loads.cuda.hold(False)
    engine.close()
    assert loads.cuda.live("streams") == 0


def fill(loads: Loads, engine: Engine) -> None:
    """Has as much under way as there may be, which is held."""
    loads.cuda.hold(True)
    begun: list[Job] = []
    for _ in range(UNDER_WAY):
        begun.append(loads.begin(engine, sizes=[1000])[0])
        until(lambda: loads.cuda.calls("cuEventRecord") == len(begun))


def test_what_comes_while_enough_is_under_way_is_enqueued_in_one_call(loads: Loads, engine: Engine) -> None:
    loads.cuda.hold(True)
    job, targets = loads.begin(engine)
    until(lambda: job.times().read_nbytes == 14 * CHUNK + 101 + 3392)  # the chunks that there are buffers for
    loads.cuda.forget_callers()
    until(lambda: loads.cuda.callers("cuEventQuery") == MOST_BUFFERS // 2)  # each thread has asked for its copies
    assert loads.cuda.calls("cuEventRecord") <= UNDER_WAY
    loads.cuda.hold(False)
    assert ended(job)
    assert loads.arrived(targets)
    assert loads.cuda.calls("cuMemcpyBatchAsync") > 0
    assert loads.cuda.calls("upload") == N_CHUNKS + 1  # one chunk is of two tensors
    calls = loads.cuda.calls("cuMemcpyBatchAsync") + loads.cuda.calls("cuMemcpyHtoDAsync_v2")
    assert calls <= UNDER_WAY + 1 + N_CHUNKS - MOST_BUFFERS


def test_what_is_decoded_on_the_device_is_copied_together(loads: Loads, engine: Engine) -> None:
    kernel = loads.cuda.kernel(loads.cuda.double, blocks_per_group=1), 1
    loads.cuda.hold(True)
    jobs = [loads.begin(engine, kernel=kernel), loads.begin(engine)]
    until(lambda: sum(job.times().read_nbytes for job, _ in jobs) >= 6 * CHUNK)
    loads.cuda.hold(False)
    for job, _ in jobs:
        assert ended(job)
        assert job.poll().failure is None
    assert loads.cuda.calls("cuMemcpyBatchAsync") > 0
    assert loads.arrived(jobs[1][1])


def test_a_kernel_that_is_refused_fails_no_other_jobs(loads: Loads, engine: Engine) -> None:
    fill(loads, engine)
    job, targets = loads.begin(engine, sizes=SIZES[:1])
    loads.cuda.fail("cuLaunchKernel", UNKNOWN)
    other, _ = loads.begin(engine, sizes=[1000], kernel=(loads.cuda.kernel(loads.cuda.double, blocks_per_group=1), 1))
    until(lambda: job.times().read_nbytes > 0)
    loads.cuda.hold(False)
    failure = failure_of(other)
    assert "cuLaunchKernel" in failure.what
    assert failure.kind.name == "DEVICE"
    assert ended(job)
    assert job.poll().failure is None
    assert ctypes.string_at(targets[0], SIZES[0]) == loads.expected(0)


@pytest.mark.parametrize("timed", [False, True])
def test_what_is_timed_or_waits_for_events_goes_by_itself(loads: Loads, engine: Engine, timed: bool) -> None:
    after = [] if timed else [loads.device.adopt_event(loads.cuda.make("cuEventCreate", 0))]
    loads.cuda.hold(True)
    job, targets = loads.begin(engine, timed=timed, after=after)
    until(lambda: loads.cuda.calls("cuEventRecord") == MOST_BUFFERS * (1 + timed))
    loads.cuda.hold(False)
    assert ended(job)
    assert loads.arrived(targets)
    assert loads.cuda.calls("cuMemcpyBatchAsync") == 0


def test_copies_that_the_driver_does_not_take_together_go_one_by_one(loads: Loads, engine: Engine) -> None:
    loads.cuda.fail("cuMemcpyBatchAsync", UNKNOWN, lasting=True)
    loads.cuda.hold(True)
    job, targets = loads.begin(engine)
    until(lambda: job.times().read_nbytes >= 14 * CHUNK)
    loads.cuda.hold(False)
    assert ended(job)
    assert job.poll().failure is None
    assert loads.arrived(targets)
    assert loads.cuda.calls("cuMemcpyHtoDAsync_v2") == N_CHUNKS + 1


def test_a_copy_that_fails_fails_no_other_jobs(loads: Loads, engine: Engine) -> None:
    fill(loads, engine)
    job, targets = loads.begin(engine, sizes=SIZES[:1])
    other, _ = loads.begin(engine, sizes=[1000], admit=False)
    engine.admit(other, max(other.groups) + 1, 0, np.array([16], np.uint64))  # where there is no memory
    until(lambda: job.times().read_nbytes > 0)  # threads that wait for what is under way may have taken the rest
    loads.cuda.hold(False)
    failure = failure_of(other)
    assert (failure.kind.name, failure.tensor, failure.code) == ("COPY", 0, "CUDA_ERROR_INVALID_VALUE")
    assert "cuMemcpyHtoDAsync_v2" in failure.what
    assert ended(job)
    assert job.poll().failure is None
    assert ctypes.string_at(targets[0], SIZES[0]) == loads.expected(0)


def test_copies_after_those_whose_event_failed_are_awaited(loads: Loads, engine: Engine) -> None:
    loads.cuda.fail("cuEventRecord", UNKNOWN)
    assert failure_of(loads.begin(engine, sizes=[1000])[0]).code
    recorded = loads.cuda.calls("cuEventRecord")
    loads.cuda.hold(True)
    job, targets = loads.begin(engine)
    until(lambda: loads.cuda.calls("cuEventRecord") == recorded + UNDER_WAY)
    assert not ended(job, 0.1)
    assert job.times().uploaded_nbytes == 0
    loads.cuda.hold(False)
    assert ended(job)
    assert loads.arrived(targets)


def test_a_job_that_is_cancelled_ends_behind_copies_that_are_not_enqueued_yet(loads: Loads, engine: Engine) -> None:
    fill(loads, engine)
    job, targets = loads.begin(engine)
    until(lambda: job.times().read_nbytes > 6 * CHUNK)  # five threads are free: some have read twice, and copied once
    engine.cancel(job)
    assert not ended(job, 0.1)
    loads.cuda.hold(False)
    assert ended(job)
    for address in targets:
        assert loads.cuda.call("cuMemFree_v2", address) == 0


def test_an_engine_that_is_closed_ends_behind_them(loads: Loads, engine: Engine) -> None:
    loads.cuda.hold(True)
    job, targets = loads.begin(engine)
    until(lambda: job.times().read_nbytes >= 14 * CHUNK)
    closing = threading.Thread(target=engine.close)
    closing.start()
    assert not ended(job, 0.1)
    loads.cuda.hold(False)
    closing.join()
    assert ended(job)
    for address in targets:
        assert loads.cuda.call("cuMemFree_v2", address) == 0


def test_an_engine_of_threads_that_have_a_buffer_each(loads: Loads) -> None:
    engine = loads.make_engine(threads=THREADS, buffers=THREADS)
    job, targets = loads.begin(engine)
    assert ended(job)
    assert loads.arrived(targets)
    engine.close()
