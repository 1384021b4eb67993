"""What the C++ engine is not to do when it is misused, short of something, or held up by one of its loads."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import gc
import logging
import os
import resource
import threading
import weakref
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncload import blocking
from asyncload.device import HostDevice as AnyHostDevice
from asyncload.errors import SourceReadError, TargetError
from asyncload.loader import Loader
from asyncload.source import NativeFileSource, open_source
from asyncload.testing import synthesize, write_layers
from asyncload.threads import run_in_thread
from tests.layers.models import SMALL, layers_only, open_stream, take
from tests.native.jobs import CHUNK, ON_HOST, Ring, Tensors, open_engine, wait
from tests.native.stub_cuda import StubCuda

pytestmark = pytest.mark.native

NATIVE = replace(SMALL, engine="native")
HOUR = 3600.0
HostKernel = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_ssize_t, ctypes.c_ssize_t, ctypes.c_ssize_t)


@contextmanager
def no_descriptor_left() -> Generator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Load:
    """A file with a job over it, and where its tensors go."""

    def __init__(self, path: Path, sizes: list[int], *, wake: str = "END") -> None:
        self.tensors = Tensors(path, sizes)
        self.file = self.tensors.open()
        self.job = self.tensors.job(self.file, wake=wake)
        self.memory = [np.zeros(size, np.uint8) for size in sizes]

    def start(self, engine: Any) -> None:
        self.tensors.start(engine, self.job, [memory.ctypes.data for memory in self.memory])

    def right(self) -> bool:
        return all(memory.tobytes() == self.tensors.wanted(index) for index, memory in enumerate(self.memory))


def device_with_copies() -> Any:
    """A device to which copies are under way for a while, so that a thread has one when it takes the next chunk."""
    from asyncload_native import HostDevice

    device = HostDevice()
    device.set_pace(0.0, 0.3, poison=False)
    return device


def test_a_load_does_not_wait_for_another_that_takes_long(tmp_path: Path) -> None:
    go_on = threading.Event()

    def decode(*_: int) -> int:
        return int(go_on.wait(60))

    function = HostKernel(decode)
    quick, slow = Load(tmp_path / "quick", [1000]), Load(tmp_path / "slow", [1000])
    kernel = ctypes.cast(function, ctypes.c_void_p).value or 0
    slow.job = slow.tensors.job(slow.file, decode=ON_HOST, kernel=kernel)
    slow.memory = [np.zeros(2000, np.uint8)]
    with open_engine(device_with_copies(), threads=1, buffers=2) as engine:
        quick.start(engine)
        slow.start(engine)
        assert wait(quick.job).failure is None
        assert quick.right()
        go_on.set()
        wait(slow.job)


def test_what_has_come_is_told_before_a_read_is_made_again(tmp_path: Path) -> None:
    load = Load(tmp_path / "file", [CHUNK, CHUNK], wake="CHUNK")
    load.file.fail_read(2, errno.EIO)
    with open_engine(device_with_copies(), threads=1, buffers=2, retry_delay=HOUR) as engine:
        load.start(engine)
        news = load.job.poll()
        while not news.moved:
            news = load.job.poll()
        assert (news.landed, news.moved, news.ended) == ([0], CHUNK, False)
        engine.cancel(load.job)
        wait(load.job)


def test_more_targets_than_tensors_are_refused(tmp_path: Path) -> None:
    load = Load(tmp_path / "file", [10, 10])
    with open_engine(device_with_copies()) as engine:
        engine.submit(load.job, [], [])
        for first, count in ((0, 3), (2, 1), (3, 0), (1 << 60, 1)):
            with pytest.raises(IndexError):
                engine.admit(load.job, 1, first, np.zeros(count, np.uint64))
        engine.cancel(load.job)
        wait(load.job)


def test_a_layer_that_is_not_there_is_refused() -> None:
    from asyncload_native import HostDevice, LayerFeed

    no_layers: list[Any] = []
    feed = LayerFeed(HostDevice(), no_layers, 1, [], each_arrival=True, trace=False, nice=0)
    with pytest.raises(IndexError):
        feed.feed(0, 4096, [])
    feed.close()


def test_a_job_without_a_file_is_refused() -> None:
    from asyncload_native import Job, Wake

    files: list[Any] = [None]
    with pytest.raises(TypeError):
        Job(files, np.zeros((0, 10), np.uint64), CHUNK, 0, Wake.END, to_host=False, timed=False, ahead=False)


def test_a_ring_is_kept_as_long_as_its_engine() -> None:
    from asyncload_native import Engine, HostDevice

    ring = Ring(4 * CHUNK)
    kept = weakref.ref(ring)
    engine = Engine(HostDevice(), ring, CHUNK, threads=2, buffers=4, nice=0, retries=0, retry_delay=0.0)
    del ring
    gc.collect()
    assert kept() is not None
    del engine  # without having been closed
    gc.collect()
    assert kept() is None


def test_who_drops_a_closed_engine_keeps_his_context(stub_cuda: StubCuda) -> None:
    from asyncload_native import CudaDevice, Driver, Engine

    def current() -> int | None:
        context = ctypes.c_void_p()
        assert stub_cuda.call("cuCtxGetCurrent", ctypes.byref(context)) == 0
        return context.value

    engine = Engine(
        CudaDevice(Driver(stub_cuda.path), 0),
        Ring(CHUNK),
        CHUNK,
        threads=1,
        buffers=1,
        nice=0,
        retries=0,
        retry_delay=0,
    )
    engine.close()
    before: list[int | None] = []
    after: list[int | None] = []
    held = [engine]
    del engine

    def drop() -> None:
        before.append(current())
        held.clear()
        after.append(current())

    thread = threading.Thread(target=drop)
    thread.start()
    thread.join()
    assert before == after == [None]


@pytest.mark.anyio
async def test_no_descriptor_left_is_an_error_of_the_source(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    await run_in_thread(lambda: synthesize(path, preset="tiny", quant="Q4_0"))
    async with Loader("host", options=NATIVE) as loader:
        source = await run_in_thread(open_source, str(path))
        assert isinstance(source, NativeFileSource)
        with no_descriptor_left(), pytest.raises(SourceReadError) as caught:
            await loader.load(source)
        assert caught.value.errno == errno.EMFILE
        assert caught.value.transient
        (await loader.load(source)).close()
        await run_in_thread(source.close)


def test_no_descriptor_left_for_layers_is_an_error_of_the_device(tmp_path: Path) -> None:
    from asyncload_native import HostDevice, LayerFeed

    no_layers: list[Any] = []
    with no_descriptor_left(), pytest.raises(OSError, match="eventfd") as caught:
        LayerFeed(HostDevice(), no_layers, 1, [], each_arrival=True, trace=False, nice=0)
    assert caught.value.errno == errno.EMFILE


def test_a_path_is_any_bytes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "asyncload.load")  # such a path goes through no pipe to another pytest
    path = tmp_path / os.fsdecode(b"f\xff.gguf")
    synthesize(path, preset="tiny", quant="Q4_0")
    with blocking.load(path, device="host", options=NATIVE) as model:
        assert len(model) > 0
    source = NativeFileSource(str(path))
    source.file.fail_read(1, errno.EBADF)
    with pytest.raises(SourceReadError, match="\udcff"):
        blocking.load(source, device="host", options=NATIVE)
    source.close()


@pytest.mark.anyio
async def test_a_source_that_was_closed_is_an_error_of_the_source(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    await run_in_thread(write_layers, path, 6)
    source = await run_in_thread(NativeFileSource, str(path))
    async with Loader(AnyHostDevice(), options=NATIVE) as loader, open_stream(loader, source, host="file") as layers:
        with pytest.raises(SourceReadError, match="closed"):
            while True:
                async for layer in layers:
                    with layer.on():
                        await run_in_thread(source.close)
        with pytest.raises(SourceReadError, match="closed"):
            await loader.load(source)


@pytest.mark.anyio
async def test_files_are_not_closed_on_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny.gguf"
    await run_in_thread(lambda: synthesize(path, preset="tiny", quant="Q4_0"))
    threads: list[int] = []
    close = NativeFileSource.close

    def closing(source: NativeFileSource) -> None:
        if not source.closed:
            threads.append(threading.get_ident())
        close(source)

    monkeypatch.setattr(NativeFileSource, "close", closing)
    async with Loader("host", options=NATIVE) as loader:
        (await loader.load(path)).close()
        async with loader.tensors(path) as tensors:
            async for _ in tensors:
                pass
        with pytest.raises(TargetError):
            await loader.load(path, into={"output.weight": np.zeros(1, np.uint8)})
        async with open_stream(loader, path, dtype="packed") as layers:
            async for layer in layers:
                layer.skip()
    assert len(threads) == 5  # the stream loads what stays on the device, and reads on
    assert threading.get_ident() not in threads


def test_a_loop_that_watches_no_descriptors_hears_of_loads_and_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watch(*_: object) -> None:
        raise NotImplementedError  # as on some other system

    monkeypatch.setattr(asyncio.SelectorEventLoop, "add_reader", watch)
    path = tmp_path / "model.gguf"
    content = layers_only(write_layers(path, 4))

    async def load() -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        async with Loader("host", options=NATIVE) as loader:
            (await loader.load(path)).close()
            async with open_stream(loader, path, dtype="packed") as layers:
                async for layer in layers:
                    found |= take(layer)
        return found

    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        assert runner.run(load()) == content
