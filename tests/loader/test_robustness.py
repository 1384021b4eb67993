"""What goes wrong around a load, and what is left of it."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from asyncload.device import DeviceMemory, HostDevice
from asyncload.errors import (
    ClosedError,
    CopyError,
    DeviceError,
    OptionsError,
    OutOfDeviceMemoryError,
    PlanError,
    SourceReadError,
)
from asyncload.events import Progress, ProgressStream
from asyncload.gguf import GGMLType
from asyncload.loader import Loader, load, read_header
from asyncload.options import EngineOption, Options
from asyncload.source import Source
from asyncload.threads import run_in_thread
from tests.loader.conftest import LATE_READ, FailingFile

pytestmark = pytest.mark.anyio


@contextmanager
def without_collector() -> Generator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def test_a_dropped_model_frees_its_memory_without_the_collector(model_path: Path, small: Options) -> None:
    async with Loader("host", options=small) as loader:
        with without_collector():
            model = await loader.load(model_path)
            assert loader.tracker.total == model.nbytes
            del model
            await run_in_thread(loader.tracker.flush)
            assert loader.tracker.total == 0


async def test_a_dropped_error_frees_its_partial_without_the_collector(
    model_path: Path, small: Options, failing_file: FailingFile
) -> None:
    async with Loader("host", options=small) as loader:
        with without_collector():
            source = failing_file(model_path, {10: errno.EBADF})
            failed = False
            try:
                await loader.load(source)
            except SourceReadError as error:
                failed = error.partial is not None
            assert failed
            with anyio.fail_after(20):  # a thread of a pool may hold the error a moment longer
                while loader.tracker.total:
                    await run_in_thread(loader.tracker.flush)


@pytest.mark.parametrize("name", ["asyncload-stream", "asyncload-events"])  # the Python engine's
async def test_a_thread_that_cannot_attach_is_an_error_and_no_hang(model_path: Path, name: str) -> None:
    class Lost(HostDevice):
        def attach(self) -> None:
            if threading.current_thread().name.startswith(name):
                raise DeviceError("context lost", device="host")
            super().attach()

    async with Loader(Lost(), options=Options(engine="python", chunk_size=64 << 10)) as loader:
        with pytest.raises(DeviceError, match="context lost"):
            await loader.load(model_path)
        assert loader._active().idle


async def test_a_callback_that_raises_no_exception_but_a_base_one(
    model_path: Path, nothing_left: Any, small: Options
) -> None:
    class Stop(BaseException):
        pass

    def stop(progress: Progress) -> None:
        if progress.tensors_done > 3:
            raise Stop

    async with Loader("host", options=small) as loader, nothing_left(loader):
        with pytest.raises(Stop):
            await loader.load(model_path, progress=stop)
        (await loader.load(model_path)).close()
        await run_in_thread(loader.tracker.flush)


async def test_the_iteration_over_progress_ends_however_early_the_load_fails(model_path: Path, small: Options) -> None:
    async with Loader("host", options=small) as loader:

        async def absent(progress: ProgressStream) -> None:
            await loader.load("/absent.gguf", progress=progress)

        async def nothing(progress: ProgressStream) -> None:
            await loader.load(model_path, select="nothing", progress=progress)

        async def stream(progress: ProgressStream) -> None:
            async with loader.tensors("/absent.gguf", progress=progress):
                pass

        async def closed(progress: ProgressStream) -> None:
            await Loader("host").load(model_path, progress=progress)

        for attempt in (absent, nothing, stream, closed):
            progress = ProgressStream()
            with pytest.raises((OSError, PlanError)):
                await attempt(progress)
            with anyio.fail_after(60):
                assert [event async for event in progress] == []


class TestAFailingFree:
    class Sticky(HostDevice):
        def free(self, memory: DeviceMemory) -> None:
            raise DeviceError(f"sticky: {memory}", device="host")

    async def test_it_does_not_stand_before_what_ended_the_load(self, model_path: Path, small: Options) -> None:
        device = self.Sticky()
        async with Loader(device, options=small) as loader:
            device.fail_upload(9)
            with pytest.raises(CopyError) as caught:
                await loader.load(model_path)
            assert caught.value.partial is not None
            caught.value.partial.close()

    async def test_nor_before_a_cancellation(self, model_path: Path, small: Options, failing_file: FailingFile) -> None:
        never_whole = failing_file(model_path, {9: errno.EIO})  # a chunk of it comes after an hour
        async with Loader(self.Sticky(bandwidth=20e6), options=replace(small, retry_delay=3600.0)) as loader:
            with anyio.CancelScope() as scope:
                await loader.load(never_whole, progress=lambda _: scope.cancel())
            assert scope.cancelled_caught


class TestResuming:
    async def partial(self, loader: Loader, source: Source) -> Any:
        with pytest.raises(SourceReadError) as caught:
            await loader.load(source)
        assert caught.value.partial is not None
        return caught.value.partial

    async def test_without_memory_for_the_rest_it_keeps_what_had_arrived(
        self, model_path: Path, small: Options, failing_file: FailingFile
    ) -> None:
        device = HostDevice()
        async with Loader(device, options=small) as loader:
            source = failing_file(model_path, {LATE_READ: errno.EBADF})
            partial = await self.partial(loader, source)

            def refuse(nbytes: int) -> None:
                raise OutOfDeviceMemoryError("full", device="host", needed=nbytes, available=0, breakdown={})

            device.on_allocate = refuse
            with pytest.raises(OutOfDeviceMemoryError):
                await loader.load(source, resume=partial)
            assert not partial.closed
            device.on_allocate = None
            model = await loader.load(source, resume=partial)
            assert len(model) == len(model.header.tensors)

    async def test_a_buffer_over_what_has_arrived_is_refused(
        self, model_path: Path, small: Options, failing_file: FailingFile
    ) -> None:
        async with Loader("host", options=small) as loader:
            source = failing_file(model_path, {LATE_READ: errno.EBADF})
            partial = await self.partial(loader, source)
            arrived = max(partial.tensors.values(), key=lambda tensor: tensor.nbytes)
            tensors = (await read_header(model_path)).tensors.values()
            missing = min((info for info in tensors if info.name not in partial.names), key=lambda info: info.nbytes)
            over = arrived.numpy().reshape(-1).view(np.uint8)[: missing.nbytes]
            if missing.type is GGMLType.F32:
                over = over.view(np.float32)
            with pytest.raises(PlanError, match=f"given for {missing.name} lies over {arrived.name}"):
                await loader.load(source, into={missing.name: over}, resume=partial)
            partial.close()


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({"dtype": None}, OptionsError),
        ({"dtype": np.float32}, OptionsError),
        ({"dtype": {"*": None}}, OptionsError),
        ({"select": 1.5}, PlanError),
    ],
)
async def test_arguments_of_the_wrong_kind_are_typed_errors(
    model_path: Path, request_: dict[str, Any], error: type[Exception], small: Options
) -> None:
    with pytest.raises(error):
        await load(model_path, device="host", options=small, **request_)


async def test_what_is_no_model_path(model_path: Path, small: Options) -> None:
    for path in ([], [1], 3):
        with pytest.raises((PlanError, TypeError)):
            await load(path, device="host", options=small)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    assert not await load(os.fsencode(model_path), device="host", options=small, select=[])  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


class TestStreams:
    async def test_one_is_entered_once(self, model_path: Path, small: Options) -> None:
        async with Loader("host", options=small) as loader:
            stream = loader.tensors(model_path)
            async with stream:
                with pytest.raises(ClosedError, match="entered once"):
                    await stream.__aenter__()

    async def test_a_loader_is_not_closed_by_the_task_that_iterates(self, model_path: Path, small: Options) -> None:
        async with Loader("host", options=small) as loader, loader.tensors(model_path) as tensors:
            with pytest.raises(ClosedError, match="still iterates"):
                await loader.__aexit__(None, None, None)
            await anext(tensors)

    async def test_a_load_inside_a_paused_stream(self, model_path: Path, small: Options) -> None:
        async with Loader("host", options=small) as loader:
            async with loader.tensors(model_path, ahead=1) as tensors:
                await anext(tensors)
                model = await loader.load(model_path)
                rest = [tensor.name async for tensor in tensors]
            assert len(rest) == len(model) - 1


@pytest.mark.asyncio
@pytest.mark.parametrize("turns", [0, 1])
async def test_a_load_cancelled_as_it_begins_leaves_nothing(
    model_path: Path, nothing_left: Any, small: Options, turns: int
) -> None:
    async with Loader(HostDevice(bandwidth=20e6, poison=True), options=small) as loader, nothing_left(loader):
        task = asyncio.ensure_future(loader.load(model_path))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def test_an_interrupt_while_a_stream_is_entered_leaves_nothing(model_path: Path, engine: EngineOption) -> None:
    program = textwrap.dedent(
        """
        import os, signal, sys, time
        from asyncload import blocking
        from asyncload.loader import _open
        from asyncload.options import Options

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started deaf to it
        open_source = _open.open_source

        def interrupt(*arguments, **options):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            return open_source(*arguments, **options)

        _open.open_source = interrupt
        options = Options(engine=sys.argv[2], chunk_size=64 << 10, staging=256 << 10, threads=2)
        with blocking.Loader("host", options=options) as loader:
            try:
                with loader.tensors(sys.argv[1], ahead=1000) as tensors:
                    for _ in tensors:
                        pass
            except KeyboardInterrupt:
                engine = loader._loader._engine
                print("interrupted", loader._loader._running, engine.idle)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(model_path), engine],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("interrupted {} True\n", "", 0)
