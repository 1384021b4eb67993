"""Chunks that are read before it is known where they go: each thread has one, and waits with it."""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.native.cuda_loads import CHUNK, SIZES, THREADS, Loads, ended, failure_of
from tests.native.jobs import until

if TYPE_CHECKING:
    from asyncload_native import Engine, Job

pytestmark = pytest.mark.native


@pytest.fixture
def waiting(loads: Loads, engine: Engine) -> tuple[Job, list[int]]:
    """A job with whose chunks all threads wait, and where it goes."""
    job, targets = loads.begin(engine, admit=False, ahead=True)
    until(lambda: job.times().read_nbytes == THREADS * CHUNK)
    return job, targets


def test_nothing_is_copied_before_it_is_admitted(loads: Loads, engine: Engine, waiting: tuple[Job, list[int]]) -> None:
    assert loads.cuda.calls("upload") == 0
    loads.admit(engine, *waiting)
    assert ended(waiting[0])
    assert loads.arrived(waiting[1])
    assert waiting[0].times().read_nbytes == sum(SIZES)  # each once


def test_nor_the_groups_behind_those_admitted(loads: Loads, engine: Engine, waiting: tuple[Job, list[int]]) -> None:
    job, targets = waiting
    engine.admit(job, 1, 0, np.array(targets[:1], np.uint64))
    until(lambda: job.times().read_nbytes == SIZES[0] + 101 + CHUNK)  # the small ones share a chunk
    until(lambda: job.times().uploaded_nbytes == SIZES[0])
    assert ctypes.string_at(targets[0], SIZES[0]) == loads.expected(0)
    loads.admit(engine, *waiting)
    assert ended(job)
    assert loads.arrived(targets)


def test_a_job_that_is_cancelled_ends(loads: Loads, engine: Engine, waiting: tuple[Job, list[int]]) -> None:
    engine.cancel(waiting[0])
    assert ended(waiting[0])
    assert loads.cuda.calls("upload") == 0


def test_so_does_one_whose_engine_is_closed(engine: Engine, waiting: tuple[Job, list[int]]) -> None:
    engine.close()
    assert ended(waiting[0])


def test_another_job_has_the_threads_meanwhile(loads: Loads, engine: Engine, waiting: tuple[Job, list[int]]) -> None:
    other, others_targets = loads.begin(engine, ahead=True)
    assert ended(other)
    assert loads.arrived(others_targets)
    assert waiting[0].times().uploaded_nbytes == 0
    loads.admit(engine, *waiting)
    assert ended(waiting[0])
    assert loads.arrived(waiting[1])


def test_and_the_first_may_be_cancelled_then(loads: Loads, engine: Engine, waiting: tuple[Job, list[int]]) -> None:
    loads.cuda.hold(True)
    other, _ = loads.begin(engine)
    until(lambda: other.times().read_nbytes == SIZES[0])  # four chunks, which all wait for their copies
    engine.cancel(waiting[0])
    assert ended(waiting[0])
    loads.cuda.hold(False)
    assert ended(other)


def test_also_before_a_read_is_made_again(loads: Loads) -> None:
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


def test_a_buffer_a_thread_is_enough(loads: Loads) -> None:
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


def test_copies_are_timed_and_wait_for_what_is_before_them(loads: Loads, engine: Engine) -> None:
    before = loads.device.adopt_event(loads.cuda.make("cuEventCreate", 0))
    job, targets = loads.begin(engine, admit=False, ahead=True, timed=True, after=[before])
    until(lambda: job.times().read_nbytes == THREADS * CHUNK)
    loads.admit(engine, job, targets)
    assert ended(job)
    assert loads.arrived(targets)
    assert sum(map(len, job.copies())) == 4 + 1 + 16 + 3


def test_of_two_that_wait_either_may_be_admitted(loads: Loads, engine: Engine, waiting: tuple[Job, list[int]]) -> None:
    other, others_targets = loads.begin(engine, admit=False, ahead=True)
    loads.admit(engine, other, others_targets)
    assert ended(other)
    assert loads.arrived(others_targets)
    engine.cancel(waiting[0])
    assert ended(waiting[0])


def test_a_read_that_fails_ends_the_job(loads: Loads, engine: Engine) -> None:
    os.truncate(loads.path, CHUNK)
    job, _ = loads.begin(engine, admit=False, ahead=True)
    assert failure_of(job).tensor == 0
