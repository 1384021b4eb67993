"""Who waits for the interpreter lock comes to it."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from asyncload.interpreter_lock import waiting


def test_who_waits_comes_to_the_lock_sooner(interval: float) -> None:
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


@pytest.mark.parametrize("own", [0.0002, 0.0005, 0.006, 1000.0])
@pytest.mark.usefixtures("interval")
def test_an_interval_of_the_programs_own_is_left_alone(own: float) -> None:
    sys.setswitchinterval(own)
    as_set = sys.getswitchinterval()
    with waiting():
        assert sys.getswitchinterval() == as_set
    assert sys.getswitchinterval() == as_set


@pytest.mark.usefixtures("interval")
def test_so_is_one_that_is_set_meanwhile_until_nobody_waits() -> None:
    with waiting():
        sys.setswitchinterval(0.002)
        with waiting():
            assert sys.getswitchinterval() == 0.002
    assert sys.getswitchinterval() == 0.002
    with waiting():
        assert sys.getswitchinterval() == 0.0005
    assert sys.getswitchinterval() == 0.002


def test_who_sets_an_interval_and_then_what_he_had_found_leaves_what_was_before(interval: float) -> None:
    with waiting():
        found = sys.getswitchinterval()
        sys.setswitchinterval(0.001)
        with waiting():
            assert sys.getswitchinterval() == 0.001
        sys.setswitchinterval(found)
    assert sys.getswitchinterval() == interval


def test_blocks_of_many_threads_leave_the_interval_as_it_was(interval: float) -> None:
    seen: set[float] = set()

    def load() -> None:
        for _ in range(200):
            with waiting():
                seen.add(sys.getswitchinterval())

    with ThreadPoolExecutor(8) as threads:
        wait([threads.submit(load) for _ in range(8)])
    assert seen == {0.0005}
    assert sys.getswitchinterval() == interval


def test_a_block_that_ends_while_another_one_begins_is_counted(
    interval: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of an abandoned load may, in a finalizer, wherever that runs."""
    abandoned = waiting()
    abandoned.__enter__()
    getswitchinterval, ends = sys.getswitchinterval, [abandoned]

    def end_it() -> float:
        while ends:
            ends.pop().__exit__(None, None, None)
        return getswitchinterval()

    monkeypatch.setattr(sys, "getswitchinterval", end_it)
    with waiting():
        pass
    assert not ends
    assert sys.getswitchinterval() == interval


FORKS = """
import os, sys
from asyncload.interpreter_lock import _turns, waiting
with waiting():
    assert sys.getswitchinterval() < 0.005
    with _turns._lock:
        child = os.fork()
    if child == 0:
        assert sys.getswitchinterval() == 0.005
if child == 0:
    assert sys.getswitchinterval() == 0.005
    with waiting():
        assert sys.getswitchinterval() < 0.005
    assert sys.getswitchinterval() == 0.005
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert sys.getswitchinterval() == 0.005
"""


def test_a_forked_child_waits_for_nobody() -> None:
    subprocess.run([sys.executable, "-c", FORKS], check=True, timeout=60)
