"""Layers by the C++ threads on the stand-in driver, where copies and work wait for each other on the device."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from asyncload.errors import CopyError, DeviceError
from asyncload.loader import LayerStream, Loader
from asyncload.testing import LayerConformance, LayerRig, Wait, differences, write_layers
from asyncload.threads import run_in_thread
from tests.layers.models import SMALL, layers_only, make_model, open_stream
from tests.native.conftest import Turns
from tests.native.jobs import readable_with_the_lock
from tests.native.stub_cuda import StubCuda
from tests.native.stub_device import StubDevice, stub_rig

pytestmark = pytest.mark.native

PATIENCE = 20.0  # seconds; it matters only where something hangs
LAUNCH_FAILED = 719
OPTIONS = replace(SMALL, decode="device", engine="native")


@pytest.fixture(params=[("asyncio", {"use_uvloop": False})], ids=["asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """One event loop: what is shown here are waits on the device."""
    return request.param


class TestStubLayers(LayerConformance):
    @pytest.fixture(autouse=True)
    def _cuda(self, stub_cuda: StubCuda) -> None:
        self.cuda = stub_cuda

    def rig(self, *, lost: Wait | None = None) -> AbstractAsyncContextManager[LayerRig]:
        return stub_rig(self.cuda, OPTIONS, lost=lost)

    def in_use(self, loader: Loader) -> Sequence[object]:
        live = [self.cuda.live(what) for what in ("memory", "registered", "streams")]
        return [*super().in_use(loader), *live, loader._active().idle]


@pytest.fixture
def device(stub_cuda: StubCuda) -> Iterator[StubDevice]:
    device = StubDevice(stub_cuda)
    yield device
    device.close()


@asynccontextmanager
async def streamed(
    folder: Path, cuda: StubCuda, host: str, *, slots: int = 2
) -> AsyncGenerator[tuple[LayerStream, int]]:
    """Twelve layers, and a consumer's stream."""
    path = folder / "model.gguf"
    await run_in_thread(partial(write_layers, path, 12))
    async with stub_rig(cuda, OPTIONS) as rig, open_stream(rig.loader, path, host=host, slots=slots) as layers:
        stream = cuda.make("cuStreamCreate", 0)
        yield layers, stream
        await run_in_thread(rig.loader.tracker.flush)
        assert cuda.call("cuStreamDestroy_v2", stream) == 0


@pytest.mark.anyio
@pytest.mark.parametrize("host", ["slabs", "file"])
async def test_a_consumers_thread_never_calls_the_driver(tmp_path: Path, stub_cuda: StubCuda, host: str) -> None:
    async with streamed(tmp_path, stub_cuda, host) as (layers, stream):
        before = stub_cuda.calls_here
        for _ in range(3):
            async for layer in layers:
                with layer.on(stream):
                    assert len(layer) > 0
        assert stub_cuda.calls_here == before
        assert stub_cuda.calls("cuStreamWaitEvent") > 0


@pytest.mark.anyio
@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("nth", [1, 3, 8])  # of its four events a layer has the last two behind its copies
@pytest.mark.parametrize(
    "function", ["cuMemcpyHtoDAsync_v2", "cuLaunchKernel", "cuEventCreate", "cuEventRecord", "cuStreamWaitEvent"]
)
async def test_what_the_driver_refuses_of_a_sweep_is_said_and_the_next_one_is_whole(
    tmp_path: Path, stub_cuda: StubCuda, *, function: str, nth: int, lasting: bool
) -> None:
    path, content = await make_model(tmp_path / "model.gguf", 12, uneven=True)
    async with stub_rig(stub_cuda, OPTIONS) as rig, open_stream(rig.loader, path, host="slabs") as layers:
        consumer, ride = await rig.consumer(sum(map(len, content.values()))), layers.join()
        stub_cuda.fail(function, LAUNCH_FAILED, nth=nth, lasting=lasting)
        with anyio.fail_after(PATIENCE):
            for _ in range(3 if lasting else 1):
                with pytest.raises(DeviceError, match=function) as caught:
                    async for _ in ride:
                        pass
                assert type(caught.value) is (CopyError if function == "cuMemcpyHtoDAsync_v2" else DeviceError)
                assert caught.value.code == "CUDA_ERROR_LAUNCH_FAILED"
                assert caught.value.layer is not None
                assert (caught.value.tensor or "").startswith(f"blk.{caught.value.layer}.")
                assert caught.value.offset
            stub_cuda.fail(function, 0, nth=1 << 30)
            async for layer in ride:
                consumer.use(layer)
        assert not differences(await run_in_thread(consumer.take), layers_only(content))


@pytest.mark.anyio
async def test_what_fails_on_its_way_is_a_copy(tmp_path: Path, stub_cuda: StubCuda) -> None:
    """Or work that copies are among."""
    async with streamed(tmp_path, stub_cuda, "slabs") as (layers, _):
        stub_cuda.fail("cuEventSynchronize", LAUNCH_FAILED, lasting=True)  # who waits for a slot does not mind
        with anyio.fail_after(PATIENCE), pytest.raises(CopyError, match="cuEventSynchronize") as caught:
            async for layer in layers:
                layer.skip()
        assert caught.value.code == "CUDA_ERROR_LAUNCH_FAILED"
        stub_cuda.fail("cuEventSynchronize", 0, nth=1 << 30)


@pytest.mark.anyio
async def test_a_sweep_does_not_end_before_its_last_copy(tmp_path: Path, stub_cuda: StubCuda) -> None:
    async with streamed(tmp_path, stub_cuda, "slabs", slots=12) as (layers, stream):
        ride = layers.join()
        stub_cuda.hold(True)
        try:
            for number in range(12):
                layer = await anext(ride)
                assert layer.number == number
                with layer.on(stream):
                    pass
            with anyio.move_on_after(0.05) as scope:
                await ride.__anext__()
            assert scope.cancelled_caught
        finally:
            stub_cuda.hold(False)
        with anyio.fail_after(PATIENCE), pytest.raises(StopAsyncIteration):
            await ride.__anext__()


@pytest.mark.anyio
@pytest.mark.parametrize("host", ["slabs", "file"])
async def test_a_sweep_and_a_capture_do_not_end_each_other(tmp_path: Path, stub_cuda: StubCuda, host: str) -> None:
    async with streamed(tmp_path, stub_cuda, host) as (layers, stream):
        with stub_cuda.capturing():
            async for layer in layers:
                with layer.on(stream):
                    assert len(layer) > 0


def test_work_begins_and_ends_without_giving_the_interpreter_lock_up(
    stub_cuda: StubCuda, device: StubDevice, turns: Turns
) -> None:
    stream, native = stub_cuda.make("cuStreamCreate", 0), device.native()
    before = turns.count
    for _ in range(100):
        _, began = native.begin_work(stream, [], patience=60.0)
        native.begin_work(stream, [began], patience=60.0)
        native.end_work(stream, patience=60.0)
    assert turns.count == before


@pytest.mark.usefixtures("without_turns")
def test_layers_come_while_somebody_keeps_the_interpreter_lock(stub_cuda: StubCuda, device: StubDevice) -> None:
    """Each time until a layer has arrived."""
    module: Any = import_module("asyncload_native")
    layers = [np.full(4096, 1 + number, np.uint8) for number in range(6)]
    slot = stub_cuda.make("cuMemAlloc_v2", 4096)
    feed = module.LayerFeed(
        device.native(),
        [np.array([[layer.ctypes.data, layer.nbytes, 0, 0, 0, 0]], np.uint64) for layer in layers],
        streams=1,
        scratch=[],
        each_arrival=True,
        trace=False,
        nice=0,
    )
    for number, layer in enumerate(layers):
        feed.feed(number, slot, [])
        assert readable_with_the_lock(feed.descriptor)
        assert [news.has_arrived for news in feed.poll()] == [False, True]
        assert ctypes.string_at(slot, layer.nbytes) == layer.tobytes()
    feed.close()
    assert stub_cuda.call("cuMemFree_v2", slot) == 0


@pytest.mark.usefixtures("without_turns")
@pytest.mark.parametrize("call", ["begin", "end"])
def test_the_lock_is_given_up_where_the_driver_lets_wait(stub_cuda: StubCuda, device: StubDevice, call: str) -> None:
    work, stalled = device.adopt(stub_cuda.make("cuStreamCreate", 0)), threading.Event()

    def go_on() -> None:
        assert stalled.wait(30)
        stub_cuda.stall(False)

    other = threading.Thread(target=go_on)
    other.start()
    stub_cuda.stall(True)
    stalled.set()
    if call == "begin":  # which would wait for ever
        work.begin(())
    else:
        work.end()
    other.join()


def test_work_waits_on_the_device_for_what_it_comes_after(stub_cuda: StubCuda, device: StubDevice) -> None:
    first, second = (device.adopt(stub_cuda.make("cuStreamCreate", 0)) for _ in range(2))
    stub_cuda.hold(True)
    _, began = first.begin(())
    ready, behind = second.begin([began])
    ended = second.end()
    assert not any(event.done() for event in (began, ready, behind, ended))
    stub_cuda.hold(False)
    ended.synchronize()
    assert all(event.done() for event in (began, ready, behind))
    assert ended.seconds_since(began) >= 0


@pytest.mark.parametrize("function", ["cuCtxSetCurrent", "cuEventCreate", "cuEventRecord", "cuStreamWaitEvent"])
def test_what_the_driver_refuses_is_said(stub_cuda: StubCuda, device: StubDevice, function: str) -> None:
    work = device.adopt(stub_cuda.make("cuStreamCreate", 0))
    stub_cuda.fail(function, 999)
    with pytest.raises(DeviceError, match=function):
        work.begin([work.end()] if function == "cuStreamWaitEvent" else ())


def test_who_comes_after_the_end_calls_the_driver_himself(stub_cuda: StubCuda, device: StubDevice) -> None:
    work = device.adopt(stub_cuda.make("cuStreamCreate", 0))
    device.close()
    before = stub_cuda.calls_here
    work.end().synchronize()
    assert stub_cuda.calls_here > before


def test_events_are_used_again(stub_cuda: StubCuda, device: StubDevice) -> None:
    work = device.adopt(stub_cuda.make("cuStreamCreate", 0))
    work.end().synchronize()
    live = stub_cuda.live("events")
    for _ in range(10):
        work.end().synchronize()
    assert stub_cuda.live("events") == live
    held = [work.end() for _ in range(3)]
    assert stub_cuda.live("events") == live + 2
    del held
