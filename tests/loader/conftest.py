"""A device that can be slowed, small models, and the invariants that hold however a load ends."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from asyncload.loader import Loader
from asyncload.testing import synthesize
from asyncload.threads import run_in_thread


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Q4_K_M model."""
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    synthesize(path, preset="tiny", quant="Q4_K_M", seed=1)
    return path


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("asyncload")}


@asynccontextmanager
async def _nothing_left(loader: Loader) -> AsyncGenerator[None]:
    """After the block everything is as before it: staging, device memory, threads, descriptors."""
    engine = loader._active()
    await run_in_thread(engine.tracker.flush)  # what was closed before is not the block's
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
