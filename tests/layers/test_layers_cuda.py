"""Layers through slots of a real GPU, with sleeping kernels in either stream."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from asyncload.layers import Layer
from asyncload.loader import Loader
from asyncload.options import EngineOption, Options
from asyncload.testing import LayerConformance, LayerRig, SleepingKernel, Wait, cuda_rig, differences, write_layers
from asyncload.threads import run_in_thread
from tests.captures import capture
from tests.layers.models import SMALL, layers_only, make_model, open_stream

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def kernel() -> Iterator[SleepingKernel]:
    kernel = SleepingKernel()
    yield kernel
    kernel.close()


class TestCudaLayers(LayerConformance):
    engine: EngineOption = "python"
    cancellations = 84  # of consumers and of streams, by feed and event loop: 1,008 together

    @pytest.fixture(autouse=True)
    def _kernel(self, kernel: SleepingKernel) -> None:
        self.kernel = kernel

    def rig(self, *, lost: Wait | None = None) -> AbstractAsyncContextManager[LayerRig]:
        return cuda_rig(self.kernel, replace(SMALL, engine=self.engine), lost=lost)

    def in_use(self, loader: Loader) -> Sequence[object]:
        return [*super().in_use(loader), loader._active().idle]


@pytest.mark.native
class TestNativeCudaLayers(TestCudaLayers):
    engine = "native"


@pytest.mark.anyio
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("host", ["slabs", "file"])
async def test_as_many_layers_as_slots_are_handed_out_while_work_is_under_way(
    tmp_path: Path, kernel: SleepingKernel, small: Options, host: str, slots: int
) -> None:
    path, content = await make_model(tmp_path / "model.gguf", 5, uneven=True, dtype="bf16")
    expected = layers_only(content)
    async with (
        cuda_rig(kernel, small) as rig,
        open_stream(rig.loader, path, dtype="bf16", slots=slots, host=host) as layers,
    ):
        ride, room = layers.join(), sum(map(len, expected.values()))
        consumers = [await rig.consumer(room) for _ in range(slots)]
        taken: list[Layer] = []
        with ExitStack() as asleep:
            # Each layer is used on a stream of its own, and nothing waits there for the sleeping kernel until the last
            # layer has come: what waits may hold up the copies of any stream that has the same hardware queue.
            with ExitStack() as blocks:
                for consumer in consumers:
                    with anyio.fail_after(30):
                        taken.append(blocks.enter_context((await anext(ride)).on(consumer.stream)))
                    asleep.enter_context(kernel.asleep(consumer.stream))
                assert [layer.number for layer in taken] == list(range(slots))
                for consumer, layer in zip(consumers, taken, strict=True):
                    consumer.work(layer)
            with anyio.move_on_after(0.05) as scope:
                await anext(ride)
            assert scope.cancelled_caught
        async for layer in ride:
            consumers[0].use(layer)
        found: dict[str, bytes] = {}
        for consumer in consumers:
            found |= await run_in_thread(consumer.take)
        assert not differences(found, expected)


@pytest.mark.anyio
@pytest.mark.parametrize("host", ["slabs", "file"])
async def test_a_sweep_and_a_capture_of_a_graph_do_not_end_each_other(
    tmp_path: Path, kernel: SleepingKernel, small: Options, host: str
) -> None:
    path, content = await make_model(tmp_path / "model.gguf", 5, uneven=True, dtype="bf16")
    expected = layers_only(content)
    async with (
        cuda_rig(kernel, small) as rig,
        open_stream(rig.loader, path, dtype="bf16", slots=2, host=host) as layers,
    ):
        consumer = await rig.consumer(sum(map(len, expected.values())))
        with capture():
            async for layer in layers:
                consumer.use(layer)
        assert not differences(await run_in_thread(consumer.take), expected)


# An error of the device's work takes the whole process's context, so it needs one of its own.
BROKEN = """
import asyncio, ctypes, sys
from asyncload.errors import DeviceError
from asyncload.loader import Loader
from asyncload.options import EngineOption, Options
from asyncload.testing import SleepingKernel

async def main():
    kernel = SleepingKernel()
    stream = kernel.stream()
    async with Loader("cuda:0") as loader:
        async with loader.stream(sys.argv[1], allow=["stream"], workspace=0, kv_bytes=0) as layers:
            for sweep in range(100):
                async for layer in layers:
                    with layer.on(stream):
                        if (sweep, layer.number) == (1, 2):
                            kernel._launch(stream, ctypes.addressof(kernel._words), 0, (8, 8, 1))

try:
    asyncio.run(main())
except DeviceError as error:
    print(type(error).__name__, error.code)
"""


def test_work_that_breaks_the_device_ends_in_its_error(tmp_path: Path) -> None:
    write_layers(tmp_path / "model.gguf", 5)
    ended = subprocess.run(
        [sys.executable, "-c", BROKEN, str(tmp_path / "model.gguf")],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
        env={**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path))},
    )
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in ended.stdout


@pytest.mark.anyio
@pytest.mark.parametrize("host", ["slabs", "file"])
@pytest.mark.parametrize("dtype", ["packed", "bf16"])
async def test_a_pass_takes_what_its_copies_and_work_take(
    tmp_path: Path, kernel: SleepingKernel, small: Options, host: str, dtype: str
) -> None:
    path, content = await make_model(tmp_path / "model.gguf", 5, uneven=True, dtype=dtype)
    async with (
        cuda_rig(kernel, small) as rig,
        open_stream(rig.loader, path, dtype=dtype, slots=2, host=host) as layers,
    ):
        consumer = await rig.consumer(sum(map(len, content.values())), seconds=0.001)
        for _ in range(2):
            async for layer in layers:
                consumer.use(layer)
            stats = await layers.last_pass()
            await run_in_thread(consumer.take)
            assert stats.nbytes == layers.plan.sweep_nbytes
            assert all(timing.compute > 0 for timing in stats.layers)
            assert stats.wall >= stats.lower_bound - 1e-6 > 0  # the device counts half microseconds
            for timing in stats.layers:
                copies = [span for stream in timing.copies for span in stream]
                assert all(begun <= arrived <= timing.work[0] + 1e-6 for begun, arrived in copies)
                chunks = len([*layers.plan.layers[timing.number].load.chunks()])
                assert host == "slabs" or len(copies) == chunks


@pytest.mark.anyio
@pytest.mark.torch
@pytest.mark.parametrize("own", [False, True])
async def test_torchs_current_stream_is_accepted(tmp_path: Path, small: Options, *, own: bool) -> None:
    torch: Any = pytest.importorskip("torch")
    path, expected = await make_model(tmp_path / "model.gguf", 5, uneven=True, dtype="bf16")
    async with Loader("cuda:0", options=small) as loader, open_stream(loader, path, dtype="bf16") as layers:
        with torch.cuda.stream(torch.cuda.Stream() if own else torch.cuda.default_stream()):
            for _ in range(2):
                copies: dict[str, Any] = {}
                async for layer in layers:
                    with layer.on(torch.cuda.current_stream()):
                        for tensor in layer.values():
                            copies[tensor.name] = torch.from_dlpack(tensor).clone()
                await run_in_thread(torch.cuda.synchronize)
                found = {name: copy.view(torch.int16).cpu().numpy().tobytes() for name, copy in copies.items()}
                assert found == layers_only(expected)


@pytest.mark.anyio
@pytest.mark.cupy
@pytest.mark.parametrize("by", ["stream", "handle"])
async def test_a_stream_of_cupys_is_accepted(tmp_path: Path, small: Options, by: str) -> None:
    cupy: Any = pytest.importorskip("cupy")
    path, expected = await make_model(tmp_path / "model.gguf", 5, uneven=True, dtype="f32")
    async with Loader("cuda:0", options=small) as loader, open_stream(loader, path, dtype="f32") as layers:
        theirs = cupy.cuda.Stream(non_blocking=True)
        for _ in range(2):
            copies: dict[str, Any] = {}
            async for layer in layers:
                with theirs, layer.on(theirs if by == "stream" else theirs.ptr):
                    for tensor in layer.values():
                        copies[tensor.name] = cupy.from_dlpack(tensor).copy()
            await run_in_thread(theirs.synchronize)
            found = {name: cupy.asnumpy(copy).tobytes() for name, copy in copies.items()}
            assert found == layers_only(expected)
