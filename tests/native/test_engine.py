"""The C++ engine by itself, on the host device: bytes, failures, the end, and the locks."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import random
import select
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.native.jobs import (
    CHUNK,
    NOWHERE,
    ON_DEVICE,
    ON_HOST,
    Outcome,
    Ring,
    Tensors,
    open_engine,
    readable_with_the_lock,
    wait,
)
from tests.native.stub_cuda import StubCuda
from tests.system_threads import system_threads

if TYPE_CHECKING:
    from asyncload_native import Event, HostDevice, Job

pytestmark = pytest.mark.native

SIZES = [3 * CHUNK + 17, 100, 0, 5000, CHUNK, 1, 2 * CHUNK, 40_000, 31_000, 9]
PLACES = [NOWHERE, ON_HOST, ON_DEVICE]
KERNEL = ctypes.CFUNCTYPE(ctypes.c_int32, *3 * [ctypes.c_ssize_t])


@pytest.fixture
def tensors(tmp_path: Path) -> Tensors:
    return Tensors(tmp_path / "tensors", SIZES)


@pytest.fixture
def device() -> HostDevice:
    from asyncload_native import HostDevice

    return HostDevice()


class Targets:
    """Memory for all tensors, and the scratch of eight buffers."""

    def __init__(self, tensors: Tensors, decode: int = NOWHERE) -> None:
        growth = 1 if decode == NOWHERE else 2
        self._tensors, self._decode = tensors, decode
        self._memory = [np.full(growth * nbytes, 0xEE, np.uint8) for nbytes in tensors.sizes]
        self._scratch = [np.empty(CHUNK, np.uint8) for _ in range(8)]
        self.addresses = [memory.ctypes.data for memory in self._memory]
        self.scratch = [memory.ctypes.data for memory in self._scratch]

    def right(self, index: int) -> bool:
        """Whether a tensor is what it is to be."""
        return self._memory[index].tobytes() == self._tensors.wanted(index, self._decode)


@contextmanager
def unfinished(device: HostDevice) -> Generator[tuple[Event, Callable[[], None]]]:
    """An event behind work on a stream, which ends when it is told to, or with the block: copies wait behind it."""
    from asyncload_native import LayerFeed

    told = threading.Event()
    kernel = KERNEL(lambda *_: int(told.wait(60)))
    memory = np.zeros(3, np.uint8)
    source, scratch, slot = range(memory.ctypes.data, memory.ctypes.data + 3)
    layer = np.array([[source, 1, 0, ctypes.cast(kernel, ctypes.c_void_p).value, 1, 1]], np.uint64)
    feed = LayerFeed(device, [layer], streams=1, scratch=[scratch], each_arrival=False, trace=False, nice=0)
    try:
        feed.feed(0, slot, [])
        assert select.select([feed.descriptor], [], [], 60)[0]
        yield feed.poll()[0].arrived[0], told.set
    finally:
        told.set()
        feed.close()


def descriptors() -> int:
    gc.collect()  # what an earlier test held
    return len(list(Path("/proc/self/fd").iterdir()))


PACES = [(0.0, 0.0, False), (0.0, 0.0, True), (200e6, 0.0, True), (0.0, 1e-3, False)]


@pytest.mark.parametrize(("pace", "ahead"), [(pace, False) for pace in PACES] + [(pace, True) for pace in PACES[1:]])
@pytest.mark.parametrize("decode", PLACES)
def test_every_tensor_comes_where_it_was_to_come(
    tensors: Tensors, stub_cuda: StubCuda, decode: int, pace: tuple[float, float, bool], ahead: bool
) -> None:
    from asyncload_native import HostDevice

    device = HostDevice()
    device.set_pace(*pace)
    targets = Targets(tensors, decode)
    with open_engine(device) as engine:
        job = tensors.job(tensors.open(), decode=decode, kernel=stub_cuda.double, wake="CHUNK", skip=[4], ahead=ahead)
        tensors.start(engine, job, targets.addresses, scratch=targets.scratch, ahead=ahead)
        outcome = wait(job)
        assert not engine.busy
    assert outcome.failure is None
    assert sorted(outcome.landed) == [index for index in range(len(SIZES)) if index != 4]
    assert outcome.moved == (1 if decode == NOWHERE else 2) * (sum(SIZES) - SIZES[4])
    assert [targets.right(index) for index in range(len(SIZES))] == [index != 4 for index in range(len(SIZES))]
    times = job.times()
    assert times.read_nbytes >= sum(SIZES) - SIZES[4]
    assert times.decoded_nbytes == (outcome.moved if decode == ON_HOST else 0)


def test_what_is_changed_on_the_way_counts_from_the_next_chunk_on(tensors: Tensors, device: HostDevice) -> None:
    """A device may be slowed, poisoned or made to fail at any time: no chunk is moved half this way, half that."""
    done = threading.Event()

    def change() -> None:
        rng = random.Random(0)
        while not done.is_set():
            device.set_pace(rng.choice([0.0, 1e9]), 0.0, rng.choice([True, False]))

    changing = threading.Thread(target=change)
    changing.start()
    try:
        with open_engine(device) as engine:
            for _ in range(100):
                targets = Targets(tensors)
                job = tensors.job(tensors.open(), ahead=True)
                tensors.start(engine, job, targets.addresses)
                assert wait(job).failure is None
                assert all(targets.right(index) for index in range(len(SIZES)))
    finally:
        done.set()
        changing.join()


def test_the_times_of_a_jobs_copies_stay_its_own(tensors: Tensors, device: HostDevice) -> None:
    targets = Targets(tensors)
    with open_engine(device, threads=1, buffers=2) as engine:
        job = tensors.job(tensors.open(), timed=True)
        tensors.start(engine, job, targets.addresses)
        assert wait(job).failure is None
        (copies,) = job.copies()
        before = [(begun.passed_at, arrived.passed_at) for begun, arrived in copies]
        assert all(arrived.seconds_since(begun) >= 0 for begun, arrived in copies)
        assert before == sorted(before)
        for _ in range(3):
            other = tensors.job(tensors.open())
            device.set_pace(0.0, 0.0, poison=True)  # not in place: events are recorded
            tensors.start(engine, other, targets.addresses)
            assert wait(other).failure is None
        assert [(begun.passed_at, arrived.passed_at) for begun, arrived in copies] == before


class TestFailures:
    def fail(self, tensors: Tensors, device: HostDevice, job: Any, targets: Targets) -> Outcome:
        before = descriptors() - 2  # the job has one, and the file
        with open_engine(device) as engine:
            tensors.start(engine, job, targets.addresses, scratch=targets.scratch)
            outcome = wait(job)
            assert not engine.busy
            assert all(targets.right(index) for index in outcome.landed)
            assert len(outcome.landed) < len(SIZES)
        job.close()
        assert descriptors() == before, "the end of a job closes its file"
        return outcome

    @pytest.mark.parametrize("decode", PLACES)
    @pytest.mark.parametrize("number", [1, 3, 6])
    def test_a_read(self, tensors: Tensors, device: HostDevice, stub_cuda: StubCuda, decode: int, number: int) -> None:
        from asyncload_native import FailureKind

        file = tensors.open()
        file.fail_read(number, errno.EBADF)
        job = tensors.job(file, decode=decode, kernel=stub_cuda.double)
        del file
        failure = self.fail(tensors, device, job, Targets(tensors, decode)).failure
        assert failure is not None
        assert (failure.kind, failure.error_number, failure.transient) == (FailureKind.READ, errno.EBADF, False)
        assert failure.what == f"{tensors.path}: {os.strerror(errno.EBADF)}"
        assert tensors.holds(failure.tensor, failure.offset)

    def test_a_read_that_fails_in_passing(self, tensors: Tensors, device: HostDevice) -> None:
        file = tensors.open()
        for number in (1, 2, 5):
            file.fail_read(number, errno.EIO)
        targets = Targets(tensors)
        with open_engine(device, threads=1, buffers=2) as engine:
            job = tensors.job(file)
            tensors.start(engine, job, targets.addresses)
            assert wait(job).failure is None
        assert job.times().retries == 3
        assert all(targets.right(index) for index in range(len(SIZES)))

    def test_a_read_that_fails_in_passing_too_often(self, tensors: Tensors, device: HostDevice) -> None:
        file = tensors.open()
        for number in range(3, 100):
            file.fail_read(number, errno.EIO)
        targets = Targets(tensors)
        with open_engine(device, threads=1, buffers=2, retries=2) as engine:
            job = tensors.job(file)
            tensors.start(engine, job, targets.addresses)
            failure = wait(job).failure
        assert failure is not None
        assert (failure.error_number, failure.transient, job.times().retries) == (errno.EIO, True, 2)

    @pytest.mark.parametrize("how", ["touch", "truncate", "remove"])
    def test_a_file_that_has_changed(self, tensors: Tensors, device: HostDevice, how: str) -> None:
        from asyncload_native import FailureKind

        job = tensors.job(tensors.open())
        if how == "touch":
            os.utime(tensors.path, ns=(5, 5))
        elif how == "truncate":
            os.truncate(tensors.path, 1000)
        else:
            tensors.path.unlink()
        outcome = self.fail(tensors, device, job, Targets(tensors))
        assert outcome.failure is not None
        assert outcome.failure.kind == FailureKind.CHANGED
        assert outcome.landed == []

    def test_a_file_that_ends_before_a_tensor_does(self, tensors: Tensors, device: HostDevice) -> None:
        from asyncload_native import FailureKind

        os.truncate(tensors.path, sum(SIZES) - 1)
        failure = self.fail(tensors, device, tensors.job(tensors.open()), Targets(tensors)).failure
        assert failure is not None
        assert (failure.kind, failure.offset) == (FailureKind.ENDED, sum(SIZES) - 1)

    def test_looking_whether_a_file_is_still_the_same(self, tensors: Tensors, device: HostDevice) -> None:
        from asyncload_native import FailureKind

        job = tensors.job(tensors.open())
        tensors.path.unlink()
        tensors.path.symlink_to(tensors.path)
        failure = self.fail(tensors, device, job, Targets(tensors)).failure
        assert failure is not None
        assert (failure.kind, failure.error_number) == (FailureKind.READ, errno.ELOOP)
        assert failure.offset is None

    @pytest.mark.parametrize("decode", PLACES)
    @pytest.mark.parametrize("number", [1, 4])
    def test_a_copy(self, tensors: Tensors, device: HostDevice, stub_cuda: StubCuda, decode: int, number: int) -> None:
        from asyncload_native import FailureKind

        device.fail_copy(number)
        job = tensors.job(tensors.open(), decode=decode, kernel=stub_cuda.double)
        outcome = self.fail(tensors, device, job, Targets(tensors, decode))
        failure = outcome.failure
        assert failure is not None
        assert (failure.kind, failure.what) == (FailureKind.COPY, "a copy failed, as a test asked")
        assert failure.tensor not in outcome.landed
        assert tensors.holds(failure.tensor, failure.offset)

    @pytest.mark.parametrize("decode", [ON_HOST, ON_DEVICE])
    @pytest.mark.parametrize("number", [1, 4])
    def test_a_kernel(
        self, tensors: Tensors, device: HostDevice, stub_cuda: StubCuda, decode: int, number: int
    ) -> None:
        from asyncload_native import FailureKind

        stub_cuda.fail("stub_double", 1, nth=number)
        job = tensors.job(tensors.open(), decode=decode, kernel=stub_cuda.double)
        failure = self.fail(tensors, device, job, Targets(tensors, decode)).failure
        assert failure is not None
        assert failure.kind == FailureKind.DEVICE
        assert "decoding kernel failed" in failure.what
        assert tensors.holds(failure.tensor, failure.offset)

    def test_what_has_failed_is_moved_by_the_next_job(self, tensors: Tensors, device: HostDevice) -> None:
        targets = Targets(tensors)
        device.fail_copy(5)
        with open_engine(device) as engine:
            job = tensors.job(tensors.open())
            tensors.start(engine, job, targets.addresses)
            landed = wait(job).landed
            assert len(landed) < len(SIZES)
            rest = tensors.job(tensors.open(), skip=landed)
            tensors.start(engine, rest, targets.addresses)
            assert sorted(landed + wait(rest).landed) == list(range(len(SIZES)))
        assert all(targets.right(index) for index in range(len(SIZES)))


class TestTheEnd:
    def test_of_a_job_that_is_cancelled_before_anything_is_admitted(self, tensors: Tensors, device: HostDevice) -> None:
        with open_engine(device) as engine:
            job = tensors.job(tensors.open())
            engine.submit(job, [], [])
            assert not job.poll().ended
            engine.cancel(job)
            assert wait(job).landed == []

    def test_of_a_job_that_is_cancelled_is_brought_about_by_another_thread(
        self, tensors: Tensors, device: HostDevice
    ) -> None:
        """As closing its files may take long."""
        with open_engine(device) as engine:
            job = tensors.job(tensors.open())
            engine.submit(job, [], [])
            before, threads = descriptors(), set(system_threads())
            engine.cancel(job)
            wait(job)
            assert descriptors() == before - 1
            assert {name for thread, name in system_threads().items() if thread not in threads} == {"asyncload-calls"}

    def test_of_a_job_that_is_cancelled_comes_behind_its_copies(self, tensors: Tensors, device: HostDevice) -> None:
        device.set_pace(10e6, 0.0, poison=True)
        targets = Targets(tensors)
        file = tensors.open()
        file.fail_read(6, errno.EIO)  # made again after an hour: not all come
        with open_engine(device, retry_delay=3600.0) as engine:
            job = tensors.job(file, wake="CHUNK")
            tensors.start(engine, job, targets.addresses)
            assert select.select([job.descriptor], [], [], 60)[0]  # some have come, others are on their way
            engine.cancel(job)
            outcome = wait(job)
            assert not any(
                device.uses(address, nbytes) for address, nbytes in zip(targets.addresses, SIZES, strict=True)
            )
        assert outcome.failure is None
        assert 0 < outcome.moved < sum(SIZES)
        assert all(targets.right(index) for index in outcome.landed)

    def test_of_an_engine_ends_its_jobs(self, tensors: Tensors, device: HostDevice) -> None:
        device.set_pace(10e6, 0.0, poison=True)
        targets = Targets(tensors)
        with open_engine(device) as engine:
            job, idle, late = (tensors.job(tensors.open()) for _ in range(3))
            tensors.start(engine, job, targets.addresses)
            engine.submit(idle, [], [])
            engine.close()
            assert wait(job).failure is None
            assert wait(idle).landed == []
            engine.submit(late, [], [])
            assert wait(late).landed == []
            engine.close()

    def test_of_a_job_without_tensors_comes_at_once(self, tmp_path: Path, device: HostDevice) -> None:
        nothing = Tensors(tmp_path / "nothing", [])
        with open_engine(device) as engine:
            job = nothing.job(nothing.open())
            nothing.start(engine, job, [])
            assert wait(job).landed == []

    def test_of_a_job_that_nobody_holds_any_more(self, tensors: Tensors, device: HostDevice) -> None:
        targets = Targets(tensors)
        before = descriptors()
        with open_engine(device) as engine, unfinished(device) as (work, finish):
            held = descriptors()
            job = tensors.job(tensors.open(), wake="CHUNK")
            tensors.start(engine, job, targets.addresses, after=[work])
            del job
            assert descriptors() > held
            finish()
            while engine.busy:
                time.sleep(0.001)
        assert descriptors() == before


class TestTheInterpreterLock:
    @contextmanager
    def spinning(self, count: int) -> Generator[None]:
        """Threads that want the lock all of the time."""
        done = threading.Event()

        def spin() -> None:
            while not done.is_set():
                sum(range(100))

        threads = [threading.Thread(target=spin) for _ in range(count)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            done.set()
            for thread in threads:
                thread.join()

    @pytest.mark.parametrize("poison", [False, True])
    @pytest.mark.parametrize("decode", PLACES)
    def test_a_load_takes_place_while_somebody_keeps_it(
        self, tensors: Tensors, device: HostDevice, stub_cuda: StubCuda, decode: int, poison: bool
    ) -> None:
        """Until the job says that it has ended."""
        device.set_pace(0.0, 0.0, poison=poison)
        targets = Targets(tensors, decode)
        with open_engine(device) as engine:
            job = tensors.job(tensors.open(), decode=decode, kernel=stub_cuda.double)
            engine.submit(job, targets.scratch, [])
            engine.admit(job, max(job.groups) + 1, 0, np.array(targets.addresses, np.uint64))
            assert readable_with_the_lock(job.descriptor)
            outcome = Outcome()
            outcome.hear(job)
        assert outcome.ended
        assert sorted(outcome.landed) == list(range(len(SIZES)))
        assert all(targets.right(index) for index in range(len(SIZES)))

    def test_jobs_are_cancelled_closed_and_dropped_at_any_time(
        self, tensors: Tensors, device: HostDevice, stub_cuda: StubCuda
    ) -> None:
        """Four threads on one engine, beside two that want the interpreter lock: nobody waits for another for ever."""
        device.set_pace(500e6, 0.0, poison=True)
        failures: list[str] = []
        before = descriptors()

        def load(engine: Any, seed: int) -> None:
            rng = random.Random(seed)
            for _ in range(40):
                decode = rng.choice(PLACES)
                targets = Targets(tensors, decode)
                job = tensors.job(
                    tensors.open(),
                    decode=decode,
                    kernel=stub_cuda.double,
                    wake=rng.choice(["END", "CHUNK"]),
                    ahead=rng.choice([True, False]),
                )
                tensors.start(engine, job, targets.addresses, scratch=targets.scratch)
                kept.append(targets)  # until the engine is closed, as nobody waits for what is dropped
                what = rng.choice(["wait", "cancel", "close", "drop"])
                time.sleep(rng.random() / 1000)
                if what == "wait":
                    outcome = wait(job)
                    if outcome.failure or not all(targets.right(index) for index in range(len(SIZES))):
                        failures.append(f"{seed}: {outcome}")
                elif what == "cancel":
                    engine.cancel(job)
                    wait(job)
                elif what == "close":
                    job.close()
                del job

        kept: list[Targets] = []
        with self.spinning(2):
            for _ in range(3):
                with open_engine(device, threads=2, buffers=5) as engine:
                    threads = [threading.Thread(target=load, args=(engine, seed)) for seed in range(4)]
                    for thread in threads:
                        thread.start()
                    for thread in threads:
                        thread.join()
                kept.clear()
        assert failures == []
        assert descriptors() == before

    def test_an_engine_is_dropped_while_its_kernels_want_it(self, tensors: Tensors, device: HostDevice) -> None:
        """A kernel that takes the lock, as one that prints an exception does, lets the engine end all the same."""
        from asyncload_native import Engine

        called = threading.Event()

        def fail(*_: int) -> int:
            called.set()
            time.sleep(0.01)
            return 0

        kernel = KERNEL(fail)
        targets = Targets(tensors, ON_HOST)
        engine = Engine(device, Ring(4 * CHUNK), CHUNK, threads=2, buffers=4, nice=0, retries=0, retry_delay=0.0)
        job = tensors.job(tensors.open(), decode=ON_HOST, kernel=ctypes.cast(kernel, ctypes.c_void_p).value or 0)
        tensors.start(engine, job, targets.addresses)
        assert called.wait(60)
        del engine
        assert wait(job).failure is not None


def test_memory_under_a_copy_is_in_use(tensors: Tensors, device: HostDevice) -> None:
    targets = Targets(tensors)
    used: Callable[[], bool] = lambda: bool(device.uses(targets.addresses[0], SIZES[0]))  # noqa: E731
    with open_engine(device) as engine, unfinished(device) as (work, finish):
        assert not used()
        job = tensors.job(tensors.open())
        tensors.start(engine, job, targets.addresses, after=[work])
        while not used():
            assert not job.poll().ended
        finish()
        wait(job)
        assert not used()


@pytest.mark.parametrize("poison", [False, True], ids=["in place", "by copies"])
def test_a_small_job_beside_a_large_one_gets_its_share(tmp_path: Path, device: HostDevice, poison: bool) -> None:
    """From the moment on at which the small one is there, each of them has one chunk in two."""
    device.set_pace(0.0, 0.0, poison)
    large, small = Tensors(tmp_path / "large", [30 * CHUNK]), Tensors(tmp_path / "small", [3 * CHUNK])
    begun, both_are_there = threading.Event(), threading.Event()
    order: list[str] = []

    def kernel(name: str) -> Any:
        def note(*_: int) -> int:
            order.append(name)
            begun.set()
            return int(both_are_there.wait(60))

        return KERNEL(note)

    kernels = {name: kernel(name) for name in ("large", "small")}
    targets = {"large": Targets(large, ON_HOST), "small": Targets(small, ON_HOST)}
    with open_engine(device, threads=1) as engine:
        jobs: list[Job] = []
        for name, tensors in (("large", large), ("small", small)):
            address = ctypes.cast(kernels[name], ctypes.c_void_p).value or 0
            jobs.append(tensors.job(tensors.open(), decode=ON_HOST, kernel=address))
            tensors.start(engine, jobs[-1], targets[name].addresses)
            assert begun.wait(60)
        both_are_there.set()
        assert [wait(job).failure for job in jobs] == [None, None]
    chunks = order.count("small")
    assert order.count("large") > 5 * chunks
    last = len(order) - order[::-1].index("small")
    assert order[:last].count("large") <= 1 + chunks  # the first was under way
