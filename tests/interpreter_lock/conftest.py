"""A clock in the place of time, the switch interval, and a small model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asyncload import interpreter_lock
from asyncload.testing import synthesize
from tests.interpreter_lock.clock import Clock, SlowClock


def set_clock(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has time be the clock's."""
    monkeypatch.setattr(interpreter_lock, "time", clock)


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
def have_cores(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Says how many cores the process may use."""

    def have_cores(count: int) -> None:
        def cores(_: int) -> set[int]:
            return set(range(count))

        monkeypatch.setattr("os.sched_getaffinity", cores)

    return have_cores


@pytest.fixture
def few_cores(have_cores: Callable[[int], None]) -> None:
    """Has the process have two cores."""
    have_cores(2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A small model."""
    (path,) = synthesize(tmp_path / "tiny.gguf", preset="tiny")
    return path
