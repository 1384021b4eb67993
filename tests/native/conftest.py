"""A CUDA driver on host memory, which ``make native`` builds."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.native.stub_cuda import StubCuda

BUILD = Path(os.environ.get("ASYNCLOAD_NATIVE_BUILD", Path(__file__).parents[2] / "build" / "native"))


@pytest.fixture(scope="session")
def _stub_library() -> StubCuda:
    path = BUILD / "libstub_cuda.so"
    assert path.exists(), f"{path} is not there: `make native` builds it"
    return StubCuda(path)


@pytest.fixture
def stub_cuda(_stub_library: StubCuda) -> Iterator[StubCuda]:
    """The stand-in driver, new; the test must not have violated anything at its end."""
    gc.collect()  # a device that an earlier test's error still held
    _stub_library.reset()
    yield _stub_library
    _stub_library.hold(False)
    violations = _stub_library.violations
    _stub_library.reset()
    assert violations == []


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
