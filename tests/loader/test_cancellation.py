"""However a load ends, invariants 1, 3 and 4 hold: nothing in flight, nothing left, nothing torn."""

from __future__ import annotations

import asyncio
import errno
import random
import types
from collections.abc import Callable, Coroutine, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest

from asyncload.device import HostDevice
from asyncload.events import Progress
from asyncload.loader import Loader
from asyncload.model import Model
from asyncload.options import DecodeOption, Options
from asyncload.threads import run_in_thread
from tests.loader.conftest import FailingFile

# A read fails in passing, and is made again after an hour: no load of such a file ends by itself.
NEVER_WHOLE = {9: errno.EIO}
HOUR = 3600.0


@pytest.fixture(params=["host", "device"])
def options(request: pytest.FixtureRequest, small: Options) -> Options:
    """Decoding at either place, so that nothing is left of a scratch either."""
    return replace(small, decode=request.param)


def slow_device() -> HostDevice:
    """Slow enough that copies are under way at any moment, and poisoned, so that a stale buffer would show."""
    return HostDevice(bandwidth=400e6, poison=True)


@types.coroutine
def cancel_at(awaitable: Coroutine[Any, Any, Any], turn: int, cancel: Callable[[], object]) -> Generator[Any, Any, Any]:
    """Runs a coroutine, and calls ``cancel`` when it suspends for the ``turn``-th time."""
    suspensions = 0
    send: Callable[[Any], Any] = awaitable.send
    value: Any = None
    while True:
        try:
            yielded = send(value)
        except StopIteration as stop:
            return stop.value
        suspensions += 1
        if suspensions == turn:
            cancel()
        try:
            value = yield yielded
            send = awaitable.send
        except BaseException as error:  # noqa: BLE001 - into the coroutine, as the loop would
            value, send = error, awaitable.throw


async def check_whole(loader: Loader, path: Path, expected: Model, dtype: str) -> None:
    """A load after all that gives the right bytes."""
    model = await loader.load(path, dtype=dtype)
    for name, tensor in model.items():
        assert np.array_equal(tensor.numpy().view(np.uint8), expected[name].numpy().view(np.uint8)), name
    model.close()


@pytest.mark.anyio
@pytest.mark.parametrize(("dtype", "decode"), [("packed", "auto"), ("bf16", "host"), ("bf16", "device")])
async def test_a_scope_cancelled_at_every_suspension(
    model_path: Path, nothing_left: Any, dtype: str, decode: DecodeOption, small: Options
) -> None:
    async with Loader(slow_device(), options=replace(small, decode=decode)) as loader:
        expected = await loader.load(model_path, dtype=dtype)
        async with nothing_left(loader):
            for turn in range(1, 1000):
                model: Model | None = None
                with anyio.CancelScope() as scope:
                    model = await cancel_at(loader.load(model_path, dtype=dtype), turn, scope.cancel)
                if model is not None:  # it ended before its turn came, or in it
                    model.close()
                    break
                assert loader._active().idle
            else:
                pytest.fail("the load never completed")
            await check_whole(loader, model_path, expected, dtype)
            await run_in_thread(loader.tracker.flush)


@pytest.mark.anyio
@pytest.mark.parametrize(("dtype", "decode"), [("packed", "auto"), ("bf16", "host"), ("bf16", "device")])
async def test_a_scope_cancelled_while_a_load_moves(
    model_path: Path,
    nothing_left: Any,
    failing_file: FailingFile,
    small: Options,
    *,
    dtype: str,
    decode: DecodeOption,
) -> None:
    never_whole = failing_file(model_path, NEVER_WHOLE)
    options = replace(small, decode=decode, retry_delay=HOUR)
    async with Loader(slow_device(), options=options) as loader, nothing_left(loader):
        with anyio.CancelScope() as scope:

            def cancel(progress: Progress) -> None:
                if progress.stage == "load":
                    scope.cancel()

            await loader.load(never_whole, dtype=dtype, progress=cancel)
        assert scope.cancelled_caught
        assert loader._active().idle
        await run_in_thread(loader.tracker.flush)


@pytest.mark.asyncio
@pytest.mark.parametrize("again", [0, 1, 5])
async def test_a_task_cancelled_at_every_suspension_and_again_during_the_cleanup(
    model_path: Path, nothing_left: Any, again: int, options: Options
) -> None:
    async with Loader(slow_device(), options=options) as loader:
        expected = await loader.load(model_path, dtype="bf16")
        async with nothing_left(loader):
            for turn in range(1, 1000):
                task: asyncio.Task[Model] = asyncio.ensure_future(_turn(loader, model_path, turn))
                await asyncio.sleep(0)
                for _ in range(again):
                    await asyncio.sleep(0)
                    if task.cancelling():
                        task.cancel()
                try:
                    (await task).close()
                except asyncio.CancelledError:
                    assert loader._active().idle
                    assert loader.tracker.total == sum(t.nbytes for t in expected.values())
                else:
                    break
            else:
                pytest.fail("the load never completed")
            await check_whole(loader, model_path, expected, "bf16")
            await run_in_thread(loader.tracker.flush)


async def _turn(loader: Loader, path: Path, turn: int) -> Model:
    task = asyncio.current_task()
    assert task is not None
    model: Model = await cancel_at(loader.load(path, dtype="bf16"), turn, task.cancel)
    return model


@pytest.mark.anyio
async def test_cancelled_after_any_number_of_turns_of_the_loop(
    model_path: Path, nothing_left: Any, options: Options
) -> None:
    rng = random.Random(0)
    async with Loader(slow_device(), options=options) as loader:
        expected = await loader.load(model_path, dtype="bf16")
        async with nothing_left(loader):
            for _ in range(60):
                turns = rng.randrange(400)
                async with anyio.create_task_group() as group:

                    async def load() -> None:
                        (await loader.load(model_path, dtype="bf16")).close()

                    group.start_soon(load)
                    for _ in range(turns):
                        await anyio.lowlevel.checkpoint()
                    group.cancel_scope.cancel()
                assert loader._active().idle
            await check_whole(loader, model_path, expected, "bf16")
            await run_in_thread(loader.tracker.flush)


@pytest.mark.anyio
async def test_cancelled_after_any_chunk(model_path: Path, nothing_left: Any, options: Options) -> None:
    """Some hundreds of loads, each ended after a random number of chunks, over a slow device with poisoned buffers."""
    rng = random.Random(1)
    async with Loader(slow_device(), options=options) as loader:
        expected = await loader.load(model_path, dtype="bf16")
        chunks: list[Progress] = []
        (await loader.load(model_path, dtype="bf16", progress=chunks.append)).close()
        async with nothing_left(loader):
            for _ in range(40):
                last = rng.randrange(len(chunks))
                seen = 0
                with anyio.CancelScope() as scope:

                    def count(progress: Progress, last: int = last, scope: anyio.CancelScope = scope) -> None:
                        nonlocal seen
                        seen += 1
                        if seen > last:
                            scope.cancel()

                    (await loader.load(model_path, dtype="bf16", progress=count)).close()
            await check_whole(loader, model_path, expected, "bf16")
            await run_in_thread(loader.tracker.flush)


@pytest.mark.asyncio
async def test_asyncio_timeout(
    model_path: Path, nothing_left: Any, options: Options, failing_file: FailingFile
) -> None:
    never_whole = failing_file(model_path, NEVER_WHOLE)
    async with Loader(slow_device(), options=replace(options, retry_delay=HOUR)) as loader, nothing_left(loader):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await loader.load(never_whole, dtype="bf16")


@pytest.mark.asyncio
async def test_the_end_of_the_loop_cancels_every_task_of_a_load(
    model_path: Path, nothing_left: Any, options: Options, failing_file: FailingFile
) -> None:
    """As ``asyncio.run`` does: all tasks natively, the pipeline's own too, again and again."""
    never_whole = failing_file(model_path, NEVER_WHOLE)
    async with Loader(slow_device(), options=replace(options, retry_delay=HOUR)) as loader, nothing_left(loader):
        started = anyio.Event()
        before = asyncio.all_tasks()

        def begun(progress: Progress) -> None:
            if progress.stage == "load":  # all tasks have begun: anyio cannot close a coroutine that has not
                started.set()

        load = asyncio.ensure_future(loader.load(never_whole, dtype="bf16", progress=begun))
        await started.wait()
        while not load.done():
            for task in asyncio.all_tasks() - before:
                task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await load


@pytest.mark.anyio
async def test_one_of_two_loads_is_cancelled(
    model_path: Path, nothing_left: Any, options: Options, failing_file: FailingFile
) -> None:
    async with Loader(slow_device(), options=replace(options, retry_delay=HOUR)) as loader:
        expected = await loader.load(model_path, dtype="bf16")
        async with nothing_left(loader):
            for _ in range(10):
                never_whole = failing_file(model_path, NEVER_WHOLE)
                async with anyio.create_task_group() as group:
                    group.start_soon(check_whole, loader, model_path, expected, "bf16")
                    with anyio.CancelScope() as scope:
                        await loader.load(never_whole, dtype="bf16", progress=lambda _, s=scope: s.cancel())
                    assert scope.cancelled_caught
                await never_whole.aclose()
            await run_in_thread(loader.tracker.flush)
