"""The threads of an engine do not share a core while another is free."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.native.conftest import BUILD
from tests.native.jobs import CHUNK, ON_HOST, Tensors, open_engine, until, wait
from tests.system_threads import system_threads

if TYPE_CHECKING:
    from asyncload_native import Engine

pytestmark = [pytest.mark.native, pytest.mark.cores]

MEETINGS = 40


class OneCore:
    """``one_core.cpp``: two workers meet in a kernel, and go on from one core."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.one_core_reset(ctypes.c_size_t(2 * MEETINGS))

    @property
    def kernel(self) -> int:
        return ctypes.cast(self._library.one_core, ctypes.c_void_p).value or 0

    @property
    def meetings(self) -> list[tuple[int, int]]:
        """From which cores the two came, each time but the first."""
        cores = [int(self._library.one_core_of(ctypes.c_size_t(call))) for call in range(2, 2 * MEETINGS)]
        return list(zip(cores[::2], cores[1::2], strict=True))


@pytest.fixture
def one_core() -> OneCore:
    return OneCore(BUILD / "libone_core.so")


@pytest.fixture
def cores() -> list[int]:
    """Two that this process may use."""
    return sorted(os.sched_getaffinity(0))[:2]


def workers() -> set[int]:
    """The threads of the process's engines."""
    return {thread for thread, name in system_threads().items() if name == "asyncload-worke"}


@contextmanager
def engine_on(cores: list[int]) -> Generator[tuple[Engine, set[int]]]:
    """An engine whose two threads may use these cores, and these threads."""
    from asyncload_native import HostDevice

    before = workers()
    with open_engine(HostDevice(), threads=2) as engine:
        until(lambda: len(workers() - before) == 2)  # they have their names
        threads = workers() - before
        for thread in threads:
            os.sched_setaffinity(thread, cores)
        yield engine, threads


def meet(engine: Engine, one_core: OneCore, tmp_path: Path) -> None:
    """A job of chunks for which both are needed."""
    tensors = Tensors(tmp_path / "tensors", [CHUNK // 4] * 2 * MEETINGS)
    memory = [np.empty(CHUNK, np.uint8) for _ in tensors.sizes]
    job = tensors.job(tensors.open(), decode=ON_HOST, kernel=one_core.kernel)
    tensors.start(engine, job, [array.ctypes.data for array in memory])
    assert wait(job).failure is None


def test_who_finds_another_on_its_core_moves(one_core: OneCore, cores: list[int], tmp_path: Path) -> None:
    with engine_on(cores) as (engine, threads):
        meet(engine, one_core, tmp_path)
        assert all(os.sched_getaffinity(thread) == set(cores) for thread in threads)
    # The system moves threads, too, and undoes or spoils a move now and then.
    assert sum(one != other for one, other in one_core.meetings) > 0.8 * len(one_core.meetings), one_core.meetings


def test_who_may_use_one_core_stays(one_core: OneCore, cores: list[int], tmp_path: Path) -> None:
    with engine_on(cores[1:]) as (engine, threads):
        meet(engine, one_core, tmp_path)
        assert all(os.sched_getaffinity(thread) == {cores[1]} for thread in threads)
    assert set(one_core.meetings) == {(cores[1], cores[1])}
