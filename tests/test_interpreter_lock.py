"""How a loop on a thread shares the interpreter lock, and who waits for it comes to it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import anyio
import pytest

from asyncload import Loader, interpreter_lock
from asyncload.device import HostDevice
from asyncload.errors import PlanError
from asyncload.interpreter_lock import UNHURRIED, Pause, overdue, waiting, working
from asyncload.layers import Scheduler
from asyncload.loader import _layer_stream, _session
from asyncload.loader._open import OpenedModel
from asyncload.loader._session import Session
from asyncload.options import EngineOption, Options
from asyncload.plan import Mode
from asyncload.source import open_source
from asyncload.testing import AsyncOnlySource, synthesize


class Clock:
    """Time that passes where it is slept, ``longer`` than was asked for, as beside a thread that keeps the lock."""

    def __init__(self) -> None:
        self.now, self.longer, self.sleeps = 100.0, 0.0, list[float]()

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds + self.longer

    def work(self, pause: Pause, seconds: float) -> int:
        """How often it pauses in so much work."""
        before, end = len(self.sleeps), self.now + seconds
        while self.now < end:
            slept = self.now
            pause()
            end += self.now - slept
            self.now += 1e-5
        return len(self.sleeps) - before


class SlowClock(Clock):
    """One by which whatever is done takes a millisecond."""

    def perf_counter(self) -> float:
        self.now += 0.001
        return self.now


def set_clock(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has time be the clock's, by which nobody was found to keep the lock."""
    monkeypatch.setattr(interpreter_lock, "time", clock)
    monkeypatch.setattr(Pause, "_kept_until", 0.0)
    monkeypatch.setattr(interpreter_lock, "_turns", interpreter_lock._Turns())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    set_clock(clock, monkeypatch)
    return clock


@pytest.fixture
def slow_clock(monkeypatch: pytest.MonkeyPatch) -> SlowClock:
    clock = SlowClock()
    set_clock(clock, monkeypatch)
    return clock


@pytest.fixture
def interval() -> Iterator[float]:
    """The interpreter's switch interval, which is set back."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.005)
    yield 0.005
    sys.setswitchinterval(interval)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A small model."""
    (path,) = synthesize(tmp_path / "tiny.gguf", preset="tiny")
    return path


# Pauses


def test_little_work_is_not_worth_a_pause(clock: Clock) -> None:
    assert clock.work(Pause(), 0.00029) == 0


def test_others_come_to_the_lock_while_there_is_much_work(clock: Clock) -> None:
    assert clock.work(Pause(), 0.01015) == 15  # after 0.3 milliseconds, then after each 0.7
    assert set(clock.sleeps) == {0.0003}


def test_who_is_in_no_hurry_sleeps_longer(clock: Clock) -> None:
    assert clock.work(Pause(UNHURRIED), 0.01015) == 15
    assert set(clock.sleeps) == {0.001}


def test_what_a_pause_took_is_worked_before_the_next_one(clock: Clock) -> None:
    clock.longer = 0.02
    assert clock.work(Pause(), 0.05) == 3


@pytest.mark.parametrize("seconds", [0.0003, UNHURRIED])
def test_but_not_of_one_that_the_machine_made_long(clock: Clock, seconds: float) -> None:
    clock.longer = 0.0049
    assert clock.work(Pause(seconds), 0.01015) == 15


def test_where_somebody_keeps_the_lock_the_next_loop_works_for_a_switch_interval(clock: Clock) -> None:
    clock.longer = 0.02
    clock.work(Pause(), 0.0011)
    assert clock.work(Pause(), sys.getswitchinterval() - 1e-4) == 0
    assert clock.work(Pause(), sys.getswitchinterval() + 1e-4) == 1


def test_and_no_longer_once_the_lock_is_free_again(clock: Clock) -> None:
    clock.longer = 0.02
    clock.work(Pause(), 0.0011)
    clock.longer = 0.0
    clock.work(Pause(), sys.getswitchinterval() + 1e-4)
    assert clock.work(Pause(), 0.0011) > 0


def test_nor_for_long(clock: Clock) -> None:
    clock.longer = 0.02
    clock.work(Pause(), 0.0011)
    clock.now += 11
    assert clock.work(Pause(), 0.0011) > 0


@pytest.mark.anyio
async def test_time_until_a_thread_has_the_lock_is_not_its_work(clock: Clock, path: Path) -> None:
    async def run(function: Callable[..., Any], *args: Any) -> Any:
        clock.now += 0.02
        return function(*args)

    async with OpenedModel(run) as opened:
        await opened.open(path, opened.pause)
    assert clock.sleeps == []


def test_loops_over_memory_pause(slow_clock: SlowClock) -> None:
    class Nobody:
        def give(self, address: int) -> bool:
            return address == 0

    device, sizes = HostDevice(), [1] * 5
    made = device.allocate_all(sizes)
    assert slow_clock.sleeps == [0.0003] * 5
    slow_clock.sleeps.clear()
    assert device.free_all(made) == {}
    assert slow_clock.sleeps == [UNHURRIED] * 5
    slow_clock.sleeps.clear()
    made = device.allocate_some(sizes, Nobody())
    assert slow_clock.sleeps == [UNHURRIED] * 5
    device.free_all(made)


@pytest.mark.anyio
@pytest.mark.parametrize("engine", ["python", pytest.param("native", marks=pytest.mark.native)])
async def test_loops_of_a_load_pause_longer_once_bytes_are_under_way(
    slow_clock: SlowClock, path: Path, engine: EngineOption
) -> None:
    async with Loader("host", options=Options(engine=engine)) as loader:
        model = await loader.load(path)
        assert set(slow_clock.sleeps) <= {0.0003, UNHURRIED}
        hurried, unhurried = (slow_clock.sleeps.count(seconds) for seconds in (0.0003, UNHURRIED))
        if engine == "native":  # for each tensor's memory, its entry in the ledger, and the tensor
            assert unhurried == 3 * len(model)
            assert hurried >= 3  # before the plan, the transfer, and the allocation
        else:
            assert unhurried == 0
            assert hurried >= 3 + 2 * len(model)
        model.close()


# Turns


def somebody_keeps_the_lock(clock: Clock) -> None:
    clock.longer = 0.02
    clock.work(Pause(), 0.0011)
    clock.longer = 0.0


def test_who_waits_comes_to_the_lock_sooner(clock: Clock, interval: float) -> None:
    with waiting():
        assert sys.getswitchinterval() == interval  # nobody keeps it
    somebody_keeps_the_lock(clock)
    assert sys.getswitchinterval() == interval
    with waiting():
        assert sys.getswitchinterval() == 0.0005
        with waiting():
            pass
        assert sys.getswitchinterval() == 0.0005
    assert sys.getswitchinterval() == interval
    with pytest.raises(ZeroDivisionError), waiting():
        assert sys.getswitchinterval() == 0.0005
        raise ZeroDivisionError
    assert sys.getswitchinterval() == interval


def test_and_is_not_interrupted_sooner_while_he_works(clock: Clock, interval: float) -> None:
    somebody_keeps_the_lock(clock)
    with working(), waiting():
        assert sys.getswitchinterval() == interval
    with waiting():
        with working(), working():
            assert sys.getswitchinterval() == interval
        assert sys.getswitchinterval() == 0.0005


def test_who_finds_out_at_work_waits_for_it_afterwards(clock: Clock, interval: float) -> None:
    with waiting():
        with working():
            somebody_keeps_the_lock(clock)
            assert sys.getswitchinterval() == interval
        assert sys.getswitchinterval() == 0.0005
    assert sys.getswitchinterval() == interval


def test_that_the_lock_is_kept_is_believed_for_a_while_whatever_chance_says(clock: Clock, interval: float) -> None:
    somebody_keeps_the_lock(clock)
    clock.work(Pause(), 0.1)
    clock.now += 9
    with waiting():
        assert sys.getswitchinterval() == 0.0005
    clock.now += 1
    with waiting():
        assert sys.getswitchinterval() == interval


def test_a_pause_in_a_shortened_interval_says_nothing(clock: Clock, interval: float) -> None:
    somebody_keeps_the_lock(clock)
    clock.now += 9
    with waiting():
        clock.longer = 0.004  # more than the interval, as on a busy machine
        assert clock.work(Pause(), 0.0201) > 0
        clock.longer = 0.0
        assert clock.work(Pause(), 0.0201) > 0
    assert clock.work(Pause(), interval - 1e-4) == 0  # still believed
    clock.now += 1.1
    with waiting():
        assert sys.getswitchinterval() == interval  # but no longer than it was
    assert clock.work(Pause(), interval - 1e-4) > 0


def test_who_hears_of_news_late_comes_to_the_lock_sooner_from_then_on(clock: Clock, interval: float) -> None:
    with waiting():
        overdue(interval - 1e-4)
        assert sys.getswitchinterval() == interval
        overdue(interval)
        assert sys.getswitchinterval() == 0.0005
    assert sys.getswitchinterval() == interval
    with waiting():
        assert sys.getswitchinterval() == 0.0005


def test_as_long_as_he_does(clock: Clock, interval: float) -> None:
    with waiting():
        overdue(interval)
        for _ in range(3):
            clock.now += 9
            overdue(0.0006)
            assert sys.getswitchinterval() == 0.0005
        clock.now += 9
        overdue(0.0004)
        assert sys.getswitchinterval() == 0.0005
        clock.now += 1
        overdue(0.0004)
        assert sys.getswitchinterval() == interval


@pytest.mark.parametrize("own", [0.0002, 0.0005, 0.006, 1000.0])
def test_an_interval_of_the_programs_own_is_left_alone(clock: Clock, interval: float, own: float) -> None:
    somebody_keeps_the_lock(clock)
    sys.setswitchinterval(own)
    as_set = sys.getswitchinterval()
    with waiting():
        assert sys.getswitchinterval() == as_set
    assert sys.getswitchinterval() == as_set


def test_so_is_one_that_is_set_meanwhile_until_nobody_waits(clock: Clock, interval: float) -> None:
    somebody_keeps_the_lock(clock)
    with waiting():
        sys.setswitchinterval(0.002)
        with working():
            assert sys.getswitchinterval() == 0.002
        assert sys.getswitchinterval() == 0.002
        with waiting():
            assert sys.getswitchinterval() == 0.002
    assert sys.getswitchinterval() == 0.002
    with waiting():
        assert sys.getswitchinterval() == 0.0005
    assert sys.getswitchinterval() == 0.002


def test_blocks_of_many_threads_leave_the_interval_as_it_was(clock: Clock, interval: float) -> None:
    somebody_keeps_the_lock(clock)
    seen: set[float] = set()

    def load() -> None:
        for _ in range(200):
            with waiting():
                seen.add(sys.getswitchinterval())
                with working():
                    pass

    with ThreadPoolExecutor(8) as threads:
        wait([threads.submit(load) for _ in range(8)])
    assert seen <= {interval, 0.0005}
    assert 0.0005 in seen
    assert sys.getswitchinterval() == interval


def test_a_block_that_ends_while_another_one_begins_is_counted(
    clock: Clock, interval: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of an abandoned load may, in a finalizer, wherever that runs."""
    somebody_keeps_the_lock(clock)
    abandoned = waiting()
    abandoned.__enter__()
    perf_counter, ends = clock.perf_counter, [abandoned]

    def end_it() -> float:
        while ends:
            ends.pop().__exit__(None, None, None)
        return perf_counter()

    monkeypatch.setattr(clock, "perf_counter", end_it)
    with working():
        pass
    assert not ends
    assert sys.getswitchinterval() == interval


FORKS = """
import os, sys
from asyncload.interpreter_lock import _turns, waiting
_turns.believe()
with waiting():
    assert sys.getswitchinterval() < 0.005
    with _turns._lock:
        child = os.fork()
    if child == 0:
        assert sys.getswitchinterval() == 0.005
if child == 0:
    assert sys.getswitchinterval() == 0.005
    _turns.believe()
    with waiting():
        assert sys.getswitchinterval() < 0.005
    assert sys.getswitchinterval() == 0.005
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert sys.getswitchinterval() == 0.005
"""


def test_a_forked_child_waits_for_nobody() -> None:
    subprocess.run([sys.executable, "-c", FORKS], check=True, timeout=60)


@pytest.mark.anyio
async def test_loads_wait_and_give_the_interval_back(
    interval: float, clock: Clock, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work, on_the_loop = list[float](), list[float]()
    make_plan = Session.make_plan

    def note(session: Session) -> None:
        at_work.append(sys.getswitchinterval())
        make_plan(session)

    monkeypatch.setattr(Session, "make_plan", note)
    monkeypatch.setattr("asyncload.pipeline._native.overdue", float)  # whatever the machine does
    async with Loader("host") as loader:

        async def load(dtype: str) -> None:
            model = await loader.load(path, dtype=dtype, progress=lambda _: on_the_loop.append(sys.getswitchinterval()))
            model.close()

        await load("packed")
        assert set(on_the_loop) == {interval}
        on_the_loop.clear()
        somebody_keeps_the_lock(clock)
        await load("packed")
        assert 0.0005 in on_the_loop
        assert sys.getswitchinterval() == interval
        with pytest.raises(PlanError):
            await load("int3")
    assert at_work == [interval] * 3
    assert sys.getswitchinterval() == interval


STREAM: Final[list[Mode]] = ["stream"]
PLANS: Final = {"tensors": (_session, "plan_load"), "layers": (_layer_stream, "plan_memory")}  # where they are made


class Gate(AsyncOnlySource):
    """A source that gives nothing as long as it is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__(open_source(path))
        self.opened = anyio.Event()
        self.opened.set()

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await self.opened.wait()
        await super().read_into(offset, buffer)


@asynccontextmanager
async def consumer(loader: Loader, gate: Gate, kind: str) -> AsyncGenerator[AsyncIterator[object]]:
    """Something that is iterated over, of which not everything comes before the gate is open."""
    if kind == "tensors":
        async with loader.tensors(gate, ahead=1) as tensors:
            gate.opened = anyio.Event()
            yield tensors
    else:
        async with loader.stream(gate, allow=STREAM, host="file") as layers:
            gate.opened = anyio.Event()
            yield aiter(layers)


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["tensors", "layers"])
async def test_who_enters_a_stream_waits(
    interval: float, clock: Clock, path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    somebody_keeps_the_lock(clock)
    at_work, (module, name) = list[float](), PLANS[kind]
    function = getattr(module, name)

    def note(*args: Any, **options: Any) -> Any:
        at_work.append(sys.getswitchinterval())
        return function(*args, **options)

    monkeypatch.setattr(module, name, note)
    gate = Gate(path)
    gate.opened = anyio.Event()
    async with Loader("host") as loader, anyio.create_task_group() as group:

        async def enter() -> None:
            async with consumer(loader, gate, kind):
                assert sys.getswitchinterval() == interval

        group.start_soon(enter)
        await anyio.wait_all_tasks_blocked()
        assert sys.getswitchinterval() == 0.0005
        gate.opened.set()
    assert at_work[0] == interval


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["tensors", "layers"])
async def test_who_leaves_a_stream_waits(
    interval: float, clock: Clock, path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    somebody_keeps_the_lock(clock)
    owner, name = (Session, "discard") if kind == "tensors" else (Scheduler, "close")
    function, seen = getattr(owner, name), list[float]()

    def note(self: Any) -> Any:
        seen.append(sys.getswitchinterval())
        return function(self)

    monkeypatch.setattr(owner, name, note)
    gate = Gate(path)
    async with Loader("host") as loader:
        async with consumer(loader, gate, kind):
            gate.opened.set()
        assert seen == [0.0005]
        assert sys.getswitchinterval() == interval


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["tensors", "layers"])
async def test_who_takes_from_a_stream_waits(interval: float, clock: Clock, path: Path, kind: str) -> None:
    somebody_keeps_the_lock(clock)
    gate, meanwhile = Gate(path), set[float]()
    async with Loader("host") as loader, consumer(loader, gate, kind) as source, anyio.create_task_group() as group:
        assert sys.getswitchinterval() == interval

        async def take() -> None:
            async for _ in source:
                meanwhile.add(sys.getswitchinterval())

        group.start_soon(take)
        await anyio.wait_all_tasks_blocked()
        assert sys.getswitchinterval() == 0.0005
        gate.opened.set()
    assert meanwhile == {interval}
    assert sys.getswitchinterval() == interval


@pytest.mark.native
@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["load", "layers"])
async def test_news_of_the_native_engine_that_are_heard_late_are_told(
    path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    late = list[float]()
    monkeypatch.setattr(
        f"asyncload.{'pipeline._native' if kind == 'load' else 'layers._native_feed'}.overdue", late.append
    )
    device = HostDevice(latency=0.02)  # so that there is something to wait for
    async with Loader(device, options=Options(engine="native")) as loader:
        if kind == "load":
            (await loader.load(path)).close()
        else:
            async with loader.stream(path, allow=STREAM, host="slabs") as layers:
                async for _ in layers:
                    pass
    assert 0.0 < max(late) < 60  # in seconds
    assert min(late) >= 0.0
