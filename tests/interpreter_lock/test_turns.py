"""Who waits for the interpreter lock comes to it."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from asyncload.interpreter_lock import Pause, overdue, waiting
from tests.interpreter_lock.clock import Clock, somebody_keeps_the_lock


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


def test_who_finds_out_while_he_waits_comes_to_it_sooner_at_once(clock: Clock, interval: float) -> None:
    with waiting():
        somebody_keeps_the_lock(clock)
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


def test_short_turns_need_no_pauses(clock: Clock, interval: float) -> None:
    somebody_keeps_the_lock(clock)
    with waiting():
        assert clock.work(Pause(), 0.1) == 0
        sys.setswitchinterval(0.002)
        with waiting():
            pass
        assert clock.work(Pause(), 0.001) > 0  # they are short no more
    assert clock.work(Pause(), 0.001) > 0


def test_a_pause_in_which_short_turns_begin_is_as_long_as_it_was(
    clock: Clock, interval: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    somebody_keeps_the_lock(clock)
    clock.now += 9
    block = waiting()

    def sleep(seconds: float) -> None:
        block.__enter__()
        clock.now += seconds + interval / 2

    monkeypatch.setattr(clock, "sleep", sleep)
    clock.work(Pause(), 0.00031)
    assert sys.getswitchinterval() == 0.0005
    block.__exit__(None, None, None)
    clock.now += 1
    with waiting():
        assert sys.getswitchinterval() == interval  # nobody was found to keep the lock once more


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
        overdue(interval)
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
    with waiting():
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
