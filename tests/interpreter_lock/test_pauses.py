"""How a loop on a thread shares the interpreter lock."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncload import Loader
from asyncload.device import HostDevice
from asyncload.interpreter_lock import UNHURRIED, Pause, waiting
from asyncload.loader._open import OpenedModel
from asyncload.options import EngineOption, Options
from tests.interpreter_lock.clock import Clock, SlowClock

pytestmark = pytest.mark.usefixtures("interval")


def test_little_work_is_not_worth_a_pause(clock: Clock) -> None:
    assert clock.work(Pause(), 0.00029) == 0


def test_others_come_to_the_lock_while_there_is_much_work(clock: Clock) -> None:
    assert clock.work(Pause(), 0.01015) == 15  # after 0.3 milliseconds, then after each 0.7
    assert set(clock.sleeps) == {0.0003}


def test_who_is_in_no_hurry_sleeps_longer(clock: Clock) -> None:
    assert clock.work(Pause(UNHURRIED), 0.01015) == 15
    assert set(clock.sleeps) == {0.001}


def test_there_are_no_more_once_somebody_has_kept_the_lock(clock: Clock) -> None:
    clock.longer = 0.02
    pause = Pause()
    assert clock.work(pause, 0.05) == 1
    pause.begin()
    assert clock.work(pause, 0.05) == 1


@pytest.mark.parametrize("seconds", [0.0003, UNHURRIED])
def test_but_a_core_may_come_late(clock: Clock, seconds: float) -> None:
    clock.longer = 0.0049
    assert clock.work(Pause(seconds), 0.01015) == 15


@pytest.mark.parametrize(("cores", "pauses"), [(1, 15), (12, 15), (13, 0)])
def test_short_turns_need_none_where_cores_are_many(
    clock: Clock, have_cores: Callable[[int], None], cores: int, pauses: int
) -> None:
    have_cores(cores)
    with waiting():
        assert clock.work(Pause(), 0.01015) == pauses


def test_turns_that_are_short_no_more_do(clock: Clock, have_cores: Callable[[int], None]) -> None:
    have_cores(64)
    pause = Pause()
    with waiting():
        assert clock.work(pause, 0.01) == 0
        sys.setswitchinterval(0.002)
        with waiting():
            pass
        assert clock.work(pause, 0.001) > 0
    assert clock.work(pause, 0.001) > 0


@pytest.mark.usefixtures("few_cores")
def test_with_short_turns_who_keeps_the_lock_shows_sooner(clock: Clock) -> None:
    with waiting():
        clock.longer = 0.0004
        assert clock.work(Pause(), 0.01015) == 15
        clock.longer = 0.0006
        assert clock.work(Pause(), 0.01015) == 1


def test_a_sleep_that_takes_a_little_longer_shows_nothing_however_short_turns_are(clock: Clock) -> None:
    sys.setswitchinterval(1e-5)
    clock.longer = 0.0001
    assert clock.work(Pause(), 0.01015) == 15


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
@pytest.mark.usefixtures("few_cores")
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
