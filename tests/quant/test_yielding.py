from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from asyncload.quant._yielding import yielding


def in_thread(function: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def step() -> None:
    """A call, at which a thread can be stopped."""


def spin_until(done: threading.Event) -> bool:
    """Whether another thread could run within many calls."""
    for _ in range(1_000_000):
        step()
        if done.is_set():
            return True
    return False


@pytest.mark.parametrize("yields", [True, False])
def test_other_threads_run_though_the_interpreter_does_not_switch(*, yields: bool) -> None:
    done, started = threading.Event(), threading.Event()

    def load() -> bool:
        with yielding():
            started.set()
            return spin_until(done)

    def answer() -> None:
        started.wait()
        done.set()

    def load_without() -> bool:
        started.set()
        return spin_until(done)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        other = threading.Thread(target=answer)
        other.start()
        assert in_thread(load if yields else load_without) is yields
        other.join()
    finally:
        sys.setswitchinterval(interval)


def test_the_profile_function_is_gone_afterwards() -> None:
    def profiles() -> tuple[Any, Any]:
        with yielding():
            inside = sys.getprofile()
        return inside, sys.getprofile()

    inside, after = in_thread(profiles)
    assert inside is not None
    assert after is None


def test_a_profiler_at_work_is_left_alone() -> None:
    def profiler(*_: Any) -> None:
        pass

    def profiles() -> tuple[Any, Any]:
        sys.setprofile(profiler)
        try:
            with yielding():
                return sys.getprofile(), profiler
        finally:
            sys.setprofile(None)

    inside, mine = in_thread(profiles)
    assert inside is mine


def test_the_main_thread_is_left_alone() -> None:
    before = sys.getprofile()
    with yielding():
        assert sys.getprofile() is before
