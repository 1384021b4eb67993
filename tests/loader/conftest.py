"""A device that can be slowed, small models, and the invariants that hold however a load ends."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from asyncload.gguf import Header
from asyncload.loader import Loader
from asyncload.options import Options
from asyncload.testing import synthesize

# Small enough for many chunks, buffers that run short, and a retry that does not wait.
SMALL = Options(chunk_size=64 << 10, staging=512 << 10, threads=2, streams=2, retry_delay=0.0)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Q4_K_M model."""
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    synthesize(path, preset="tiny", quant="Q4_K_M", seed=1)
    return path


@pytest.fixture
def anyio_backend_name(anyio_backend: Any) -> str:
    return anyio_backend[0] if isinstance(anyio_backend, tuple) else anyio_backend


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("asyncload")}


async def settled(loader: Loader) -> None:
    """Waits until what was dropped is freed."""
    from asyncload.threads import run_in_thread

    await run_in_thread(loader.tracker.flush)


@asynccontextmanager
async def _nothing_left(loader: Loader) -> AsyncIterator[None]:
    """After the block everything is as before it: staging, device memory, threads, descriptors."""
    engine = loader._active()
    before = engine.tracker.total, engine.staging.free, _descriptors()
    device = engine.device
    used = device.info.total_bytes - device.memory().free
    yield
    assert engine.tracker.total == before[0], engine.tracker.report()
    assert engine.staging.free == before[1] == engine.options.buffers
    assert _descriptors() == before[2]
    assert device.info.total_bytes - device.memory().free == used
    allowed = ("asyncload-reader", "asyncload-stream", "asyncload-events", "asyncload-reclaim", "asyncload-host")
    assert all(name.startswith(allowed) for name in _threads()), _threads()


@pytest.fixture
def nothing_left() -> Callable[[Loader], AbstractAsyncContextManager[None]]:
    return _nothing_left


def bytes_of(path: Path, header: Header, name: str) -> bytes:
    """A tensor's bytes as they stand in the file."""
    info = header.tensors[name]
    with path.open("rb") as file:
        file.seek(info.offset)
        return file.read(info.nbytes)
