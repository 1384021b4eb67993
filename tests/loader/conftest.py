"""Both engines, small models, files that fail, and the invariants that hold however a load ends."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from asyncload.loader import Loader
from asyncload.options import EngineOption, Options
from asyncload.source import NativeFileSource, Source
from asyncload.source._file import FileSource
from asyncload.testing import synthesize
from asyncload.threads import run_in_thread

# Opens a file; with what some reads of it fail, by their number.
FailingFile = Callable[[Path, Mapping[int, int]], Source]

# Reads of the small model that fail when some of its tensors have landed for certain: a chunk keeps its buffer until
# its copy has passed, so of the chunks that were begun at most as many are missing as there are buffers, eight.
LATE_READ = 30
LATE_READ_AS_BF16 = 80  # decoded on the host, where a tensor takes more chunks


@pytest.fixture(params=["python", pytest.param("native", marks=pytest.mark.native)])
def engine(request: pytest.FixtureRequest) -> EngineOption:
    """Runs a test once on each engine."""
    engine: EngineOption = request.param
    return engine


@pytest.fixture
def small(engine: EngineOption) -> Options:
    """Sizes at which a small model has many chunks."""
    return Options(engine=engine, chunk_size=64 << 10, staging=512 << 10, threads=2, streams=2, retry_delay=0.0)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Q4_K_M model."""
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    synthesize(path, preset="tiny", quant="Q4_K_M", seed=1)
    return path


class _FailingFile(FileSource):
    """A file of which some reads fail, by their number: 0 is the header's."""

    def __init__(self, path: Path, faults: Mapping[int, int]) -> None:
        super().__init__(path)
        self._faults = faults
        self._numbers = count()

    def read_into_blocking(self, offset: int, buffer: memoryview) -> None:
        """Reads or fails."""
        if number := self._faults.get(next(self._numbers)):
            raise self._error(OSError(number, os.strerror(number)), offset)
        super().read_into_blocking(offset, buffer)


def _failing_native_file(path: Path, faults: Mapping[int, int]) -> NativeFileSource:
    source = NativeFileSource(str(path))
    file: Any = source.file
    for number, error_number in faults.items():
        file.fail_read(number, error_number)
    return source


@pytest.fixture
def failing_file(engine: EngineOption) -> Iterator[FailingFile]:
    """Opens a model's file for an engine; with what some of a load's reads fail, by their number: 1 is the first."""
    opened: list[NativeFileSource | FileSource] = []

    def open_file(path: Path, faults: Mapping[int, int]) -> Source:
        opened.append((_failing_native_file if engine == "native" else _FailingFile)(path, faults))
        return opened[-1]

    yield open_file
    for source in opened:
        source.close()


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("asyncload")}


@asynccontextmanager
async def _nothing_left(loader: Loader) -> AsyncGenerator[None]:
    """After the block everything is as before it: staging, device memory, threads, descriptors."""
    engine = loader._active()
    gc.collect()  # files in the tracebacks of tests before are not the block's
    await run_in_thread(engine.tracker.flush)  # nor is what was closed before
    assert engine.idle
    before = engine.tracker.total, _descriptors()
    device = engine.device
    used = device.info.total_bytes - device.memory().free
    yield
    assert engine.tracker.total == before[0], engine.tracker.report()
    assert engine.idle
    assert _descriptors() == before[1]
    assert device.info.total_bytes - device.memory().free == used
    allowed = (
        "asyncload-reader",
        "asyncload-call",
        "asyncload-stream",
        "asyncload-events",
        "asyncload-reclaim",
        "asyncload-host",
    )
    assert all(name.startswith(allowed) for name in _threads()), _threads()


@pytest.fixture
def nothing_left() -> Callable[[Loader], AbstractAsyncContextManager[None]]:
    return _nothing_left
