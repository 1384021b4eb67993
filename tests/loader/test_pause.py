"""How a loop on a thread shares the interpreter lock."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncload.loader import _open
from asyncload.loader._open import OpenedModel, Pause


class Clock:
    """Time that passes where it is slept, ``longer`` than was asked for, as beside a thread that keeps the lock."""

    def __init__(self) -> None:
        self.now, self.longer, self.sleeps = 100.0, 0.0, 0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps += 1
        self.now += seconds + self.longer

    def work(self, pause: Pause, seconds: float) -> int:
        """How often it pauses in so much work."""
        before, end = self.sleeps, self.now + seconds
        while self.now < end:
            slept = self.now
            pause()
            end += self.now - slept
            self.now += 1e-5
        return self.sleeps - before


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(_open, "time", clock)
    monkeypatch.setattr(Pause, "_kept_until", 0.0)
    return clock


def test_little_work_is_not_worth_a_pause(clock: Clock) -> None:
    assert clock.work(Pause(), 0.0009) == 0


def test_others_come_to_the_lock_while_there_is_much_work(clock: Clock) -> None:
    assert clock.work(Pause(), 0.0103) == 10  # after each millisecond


def test_what_a_pause_took_is_worked_before_the_next_one(clock: Clock) -> None:
    clock.longer = 0.02
    assert clock.work(Pause(), 0.05) == 3


def test_but_not_of_one_that_the_machine_made_long(clock: Clock) -> None:
    clock.longer = 0.004
    assert clock.work(Pause(), 0.0103) == 10


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
async def test_time_until_a_thread_has_the_lock_is_not_its_work(clock: Clock, model_path: Path) -> None:
    async def run(function: Callable[..., Any], *args: Any) -> Any:
        clock.now += 0.02
        return function(*args)

    async with OpenedModel(run) as opened:
        await opened.open(model_path, opened.pause)
    assert clock.sleeps == 0
