from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest

from asyncload.device import HostDevice
from asyncload.errors import ClosedError, OptionsError, SourceNotFoundError, SourceReadError
from asyncload.events import Progress
from asyncload.loader import Loader
from asyncload.model import Tensor
from asyncload.options import Options
from asyncload.threads import run_in_thread
from tests.loader.conftest import LATE_READ, FailingFile


async def idle(loader: Loader) -> None:
    """Waits until nothing of any load moves any more: no read, no copy."""
    engine = loader._active()
    while not engine.idle:
        await anyio.sleep(0.001)
    for _ in range(50):
        await anyio.lowlevel.checkpoint()


@pytest.mark.anyio
@pytest.mark.parametrize("ahead", [1, 300_000, 1 << 30])
async def test_every_tensor_comes_once(model_path: Path, ahead: int, small: Options) -> None:
    async with Loader("host", options=small) as loader:
        model = await loader.load(model_path, dtype="f16")
        seen: dict[str, Tensor] = {}
        async with loader.tensors(model_path, ahead=ahead, dtype="f16") as tensors:
            assert list(tensors.header.tensors) == list(model)
            async for tensor in tensors:
                assert tensor.name not in seen
                seen[tensor.name] = tensor
    assert set(seen) == set(model)
    for name, tensor in seen.items():
        assert np.array_equal(tensor.numpy(), model[name].numpy())


@pytest.mark.anyio
@pytest.mark.parametrize("ahead", [1, 300_000, 2_000_000])
async def test_a_paused_consumer_holds_no_staging_and_at_most_ahead(
    model_path: Path, ahead: int, small: Options
) -> None:
    async with Loader("host", options=small) as loader:
        largest = 0
        async with loader.tensors(model_path, ahead=ahead) as tensors:
            taken = 0
            async for tensor in tensors:
                largest = max(largest, tensor.nbytes)
                taken += 1
                await idle(loader)
                kept = loader.tracker.total - tensor.nbytes
                assert kept <= max(ahead, *(info.nbytes for info in tensors.header.tensors.values()))
                del tensor
                await run_in_thread(loader.tracker.flush)
            assert taken == len(tensors.header.tensors)


@pytest.mark.anyio
async def test_leaving_early_ends_the_load_and_keeps_what_was_taken(
    model_path: Path, nothing_left: Any, small: Options
) -> None:
    async with Loader(HostDevice(bandwidth=20e6, poison=True), options=small) as loader, nothing_left(loader):
        async with loader.tensors(model_path) as tensors:
            tensor = await anext(tensors)
        data = tensor.numpy()
        assert loader.tracker.total == tensor.nbytes
        expected = await loader.load(model_path, select=tensor.name)
        assert np.array_equal(data, expected[tensor.name].numpy())
        with pytest.raises(ClosedError):
            await anext(tensors)
        del data, tensor
        expected.close()
        await run_in_thread(loader.tracker.flush)


@pytest.mark.anyio
async def test_an_exception_in_the_consumer_comes_out_as_it_is(
    model_path: Path, nothing_left: Any, small: Options
) -> None:
    async with Loader(HostDevice(bandwidth=20e6), options=small) as loader, nothing_left(loader):
        with pytest.raises(LookupError, match="mine"):
            async with loader.tensors(model_path) as tensors:
                async for tensor in tensors:
                    del tensor
                    raise LookupError("mine")
        await run_in_thread(loader.tracker.flush)


@pytest.mark.anyio
async def test_an_error_of_the_source_comes_after_the_tensors_before_it(
    model_path: Path, nothing_left: Any, small: Options, failing_file: FailingFile
) -> None:
    source = failing_file(model_path, {LATE_READ: errno.EBADF})
    async with Loader("host", options=small) as loader, nothing_left(loader):
        count = 0
        with pytest.raises(SourceReadError):
            async with loader.tensors(source) as tensors:
                async for tensor in tensors:
                    del tensor
                    count += 1
        assert count > 0
        await run_in_thread(loader.tracker.flush)


@pytest.mark.anyio
async def test_what_cannot_begin_says_so_on_entering(model_path: Path, nothing_left: Any, small: Options) -> None:
    async with Loader("host", options=small) as loader, nothing_left(loader):
        with pytest.raises(SourceNotFoundError):
            async with loader.tensors("/absent.gguf"):
                pytest.fail("entered")
        with pytest.raises(OptionsError):
            loader.tensors(model_path, ahead=0)
        with pytest.raises(ClosedError):
            await anext(loader.tensors(model_path))


@pytest.mark.anyio
async def test_cancelled_at_any_turn_of_the_loop(model_path: Path, nothing_left: Any, small: Options) -> None:
    async with Loader(HostDevice(bandwidth=200e6, poison=True), options=small) as loader, nothing_left(loader):

        async def consume() -> None:
            async with loader.tensors(model_path, ahead=400_000) as tensors:
                async for tensor in tensors:
                    del tensor
                    await anyio.lowlevel.checkpoint()

        for turns in range(0, 200, 4):
            async with anyio.create_task_group() as group:
                group.start_soon(consume)
                for _ in range(turns):
                    await anyio.lowlevel.checkpoint()
                group.cancel_scope.cancel()
            assert loader._active().idle
        await run_in_thread(loader.tracker.flush)


@pytest.mark.asyncio
async def test_a_consumers_task_is_cancelled_again_and_again(
    model_path: Path, nothing_left: Any, small: Options
) -> None:
    async with Loader(HostDevice(bandwidth=50e6, poison=True), options=small) as loader, nothing_left(loader):
        taken = anyio.Event()

        async def consume() -> None:
            async with loader.tensors(model_path) as tensors:
                async for tensor in tensors:
                    del tensor
                    taken.set()

        task = asyncio.ensure_future(consume())
        await taken.wait()
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        await run_in_thread(loader.tracker.flush)


@pytest.mark.anyio
async def test_a_closed_loader_ends_the_stream(model_path: Path, small: Options) -> None:
    loader = Loader(HostDevice(bandwidth=5e6), options=small)
    await loader.__aenter__()
    started = anyio.Event()

    async def consume() -> None:
        def begun(_: Progress) -> None:
            started.set()

        with pytest.raises(ClosedError):
            async with loader.tensors(model_path, progress=begun) as tensors:
                async for _ in tensors:
                    pass

    async with anyio.create_task_group() as group:
        group.start_soon(consume)
        await started.wait()
        await loader.__aexit__(None, None, None)
