"""Both engines, a model of six layers that differ in size, and the invariants that hold however a stream ends."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path

import anyio
import pytest

from asyncload.loader import Loader
from asyncload.threads import run_in_thread
from tests.layers.models import Content, make_model
from tests.loader.conftest import engine, failing_file, small
from tests.loader.conftest import nothing_left as nothing_left_of_loads
from tests.system_threads import system_threads

__all__ = ["engine", "failing_file", "nothing_left_of_loads", "small"]

_PATIENCE = 20.0  # seconds; it matters only where something hangs


@pytest.fixture(scope="session")
def six_layers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Content]:
    """The path, and what each tensor is in float16."""
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    return anyio.run(partial(make_model, path, 6, uneven=True))


def _feeds_by_threads() -> bool:
    """Whether a C++ thread feeds layers."""
    return not {"asyncload-feed", "asyncload-slots", "asyncload-copy"}.isdisjoint(system_threads().values())


@pytest.fixture
def nothing_left(
    nothing_left_of_loads: Callable[[Loader], AbstractAsyncContextManager[None]],
) -> Callable[[Loader], AbstractAsyncContextManager[None]]:
    """What a load leaves as it was, and no C++ thread that feeds layers."""

    @asynccontextmanager
    async def nothing_left(loader: Loader) -> AsyncGenerator[None]:
        async with nothing_left_of_loads(loader):
            yield
        with anyio.fail_after(_PATIENCE):  # the system counts a thread a little longer than it runs
            while await run_in_thread(_feeds_by_threads):
                await anyio.sleep(0.001)

    return nothing_left
