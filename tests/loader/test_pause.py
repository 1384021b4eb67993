"""How a loop on a thread shares the interpreter lock."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asyncload.loader import _open
from asyncload.loader._open import OpenedModel, Pause


class Clock:
    """Time that passes where it is slept, ``longer`` than was asked for, as beside a thread that keeps the lock.

    ``waits``: how often the event loop will have the lock yet before it has nothing to do; each time it runs for a
    moment. ``late``: how many sleeps go by before it has a core.
    """

    def __init__(self) -> None:
        self.now, self.longer, self.sleeps = 100.0, 0.0, 0
        self.waits, self.late, self.ran = 0, 0, 0

    def perf_counter(self) -> float:
        return self.now

    def pthread_getcpuclockid(self, thread: int) -> int:
        assert thread == threading.get_ident()
        return thread

    def clock_gettime_ns(self, _: int) -> int:
        return self.ran

    def sleep(self, seconds: float) -> None:
        self.sleeps += 1
        self.now += seconds + self.longer
        if self.late:
            self.late -= 1
        elif self.waits:
            self.waits -= 1
            self.ran += 1

    def wake_up(self, waits: int = 1) -> None:
        """The event loop has something to do, and waits for the lock."""
        self.waits += waits
        self.ran += 1

    def work(self, pause: Pause, seconds: float) -> int:
        """How often it sleeps in so much work."""
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
    return clock


def test_where_nobody_waits_there_is_no_pause(clock: Clock) -> None:
    assert clock.work(Pause(), 0.05) == 0


def test_little_work_is_not_worth_a_pause(clock: Clock) -> None:
    pause = Pause()
    clock.wake_up()
    assert clock.work(pause, 0.0004) == 0
    assert clock.work(pause, 0.0002) > 0


@pytest.mark.parametrize("late", [0, 2])
def test_an_event_loop_has_the_lock_until_it_has_nothing_to_do(clock: Clock, late: int) -> None:
    pause = Pause()
    clock.wake_up(waits=3)
    clock.late = late
    assert clock.work(pause, 0.0006) == late + 3 + 1
    assert clock.waits == 0
    assert clock.work(pause, 0.05) == 0


def test_it_is_not_waited_for_where_it_does_not_come(clock: Clock) -> None:
    pause = Pause()
    clock.ran += 1  # and fell asleep again
    begin = clock.now
    clock.work(pause, 0.05)
    assert 0.0003 <= clock.now - begin - 0.05 < 0.0004


def test_and_soon_when_it_wakes_up_again(clock: Clock) -> None:
    pause = Pause()
    clock.work(pause, 0.01)
    clock.wake_up()
    clock.work(pause, 2e-5)
    assert clock.waits == 0


def test_one_that_always_has_something_to_do_gets_a_share(clock: Clock) -> None:
    pause = Pause()
    clock.wake_up(waits=10**6)
    begin, work = clock.now, 0.0053
    clock.work(pause, work)
    assert 10 * 0.0003 <= clock.now - begin - work < 10 * 0.0004  # after each half of a millisecond


def test_what_a_pause_took_is_worked_before_the_next_one(clock: Clock) -> None:
    pause = Pause()
    clock.longer = 0.02
    clock.wake_up(waits=10**6)
    assert clock.work(pause, 0.05) == 3


def test_but_not_of_one_that_the_machine_made_long(clock: Clock) -> None:
    pause = Pause()
    clock.longer = 0.004
    clock.wake_up(waits=10**6)
    assert clock.work(pause, 0.0053) == 10


@pytest.mark.skipif(sys.platform != "linux", reason="NOT RUN: other systems do not tell what a thread has run for")
def test_from_outside_one_sees_whether_a_thread_runs() -> None:
    processor_time = _open._processor_time()
    seen: list[int] = []

    def watch() -> None:
        while seen[-1:] != [now := processor_time()]:  # until it stands still, as this is waited for
            seen.append(now)

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert processor_time() > seen[-1]


@pytest.mark.anyio
async def test_time_until_a_thread_has_the_lock_is_not_its_work(clock: Clock, model_path: Path) -> None:
    async def run(function: Callable[..., Any], *args: Any) -> Any:
        clock.now += 0.02
        return function(*args)

    async with OpenedModel(run) as opened:
        await opened.open(model_path, opened.pause)
    assert clock.sleeps == 0
