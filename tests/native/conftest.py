"""A CUDA driver on host memory, which ``make native`` builds."""

from __future__ import annotations

import functools
import gc
import os
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.native.cuda_loads import Loads
from tests.native.stub_cuda import StubCuda

if TYPE_CHECKING:
    from asyncload_native import Engine

BUILD = Path(os.environ.get("ASYNCLOAD_NATIVE_BUILD", Path(__file__).parents[2] / "build" / "native"))


@functools.cache
def load_stub(name: str) -> StubCuda:
    """One of the stand-in drivers, once a process."""
    path = BUILD / name
    assert path.exists(), f"{path} is not there: `make native` builds it"
    return StubCuda(path)


@contextmanager
def new_stub(name: str) -> Generator[StubCuda]:
    """A stand-in driver as it is when it is loaded; nothing must have been violated at the end."""
    gc.collect()  # a device that an earlier test's error still held
    stub = load_stub(name)
    stub.reset()
    yield stub
    stub.hold(False)
    violations = stub.violations
    stub.reset()
    assert violations == []


@pytest.fixture
def stub_cuda() -> Iterator[StubCuda]:
    """The stand-in driver, new."""
    with new_stub("libstub_cuda.so") as stub:
        yield stub


@pytest.fixture(params=["libstub_cuda.so", "libstub_cuda_old.so"])
def loads(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Loads]:
    """Loads by each stand-in driver: one that combines copies, and one that does not."""
    with new_stub(request.param) as stub:
        yield Loads(stub, tmp_path / "file")


@pytest.fixture
def engine(loads: Loads) -> Iterator[Engine]:
    """An engine for these, closed at the end."""
    engine = loads.make_engine()
    yield engine
    loads.cuda.hold(False)
    engine.close()
    assert loads.cuda.live("streams") == 0  # the events are the device's


@pytest.fixture
def without_turns() -> Iterator[None]:
    """No thread loses the interpreter lock before it gives it up."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    yield
    sys.setswitchinterval(interval)


class Turns:
    """Counts the turns that a thread has had with the interpreter lock, which it gives up after each."""

    def __init__(self) -> None:
        self.count, self._done, self._ready = 0, False, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(30)

    def _run(self) -> None:
        while not self._done:
            self.count += 1
            self._ready.set()
            time.sleep(0)  # gives the lock up, in all versions of Python

    def end(self) -> None:
        """Ends the thread."""
        self._done = True
        self._thread.join()


@pytest.fixture
def turns(without_turns: None) -> Iterator[Turns]:
    """Another thread that wants the lock, and has it only where it is given up."""
    turns = Turns()
    yield turns
    turns.end()
