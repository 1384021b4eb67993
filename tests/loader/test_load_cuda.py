"""The whole way into a real GPU."""

from __future__ import annotations

import mmap
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from asyncload.device import DeviceMemory, open_device
from asyncload.loader import Loader, load
from asyncload.memory import Purpose
from asyncload.model import Tensor
from asyncload.options import DecodeOption, Options
from asyncload.testing import synthesize
from asyncload.threads import run_in_thread
from tests.captures import capture

pytestmark = [pytest.mark.gpu, pytest.mark.anyio]
# What the driver keeps or gives back of its own accord, for streams' first kernels; a scratch that leaked in each of a
# test's 60 loads would be 7.5 MiB.
DRIVERS_OWN = 4 << 20


def on_host(loader_device: Any, model: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Every tensor's bytes, read back from the device."""
    result: dict[str, bytes] = {}
    for name, tensor in model.items():
        buffer = bytearray(tensor.nbytes)
        if tensor.nbytes:
            loader_device.download(DeviceMemory(tensor.address, tensor.nbytes), 0, memoryview(buffer))
        result[name] = bytes(buffer)
    return result


@pytest.mark.parametrize("decode", ["device", "host"])
@pytest.mark.parametrize("dtype", ["packed", "float32", "float16", "bfloat16"])
async def test_the_device_gets_what_the_host_gets(
    model_path: Path, dtype: str, decode: DecodeOption, small: Options
) -> None:
    expected = await load(model_path, device="host", dtype=dtype)
    async with Loader("cuda:0", options=replace(small, decode=decode)) as loader:
        model = await loader.load(model_path, dtype=dtype)
        found = await run_in_thread(on_host, loader.device, model)
        assert list(model) == list(expected)
        for name, tensor in expected.items():
            assert found[name] == tensor.numpy().tobytes(), name
            assert (model[name].shape, model[name].dtype) == (tensor.shape, tensor.dtype)


@pytest.mark.parametrize("dtype", ["packed", "bfloat16"])
async def test_a_load_and_a_capture_of_a_graph_do_not_end_each_other(
    model_path: Path, dtype: str, small: Options
) -> None:
    expected = await load(model_path, device="host", dtype=dtype)
    async with Loader("cuda:0", options=replace(small, decode="device")) as loader:
        with capture():
            model = await loader.load(model_path, dtype=dtype)
            await run_in_thread(loader.tracker.flush)  # what it decoded in is freed, too
        found = await run_in_thread(on_host, loader.device, model)
        assert found == {name: tensor.numpy().tobytes() for name, tensor in expected.items()}


@pytest.mark.torch
async def test_torch_has_the_tensors_after_loader_and_model_are_gone(model_path: Path) -> None:
    torch: Any = pytest.importorskip("torch")
    expected = await load(model_path, device="host", dtype="bf16")
    model = await load(model_path, device="cuda", dtype="bf16")
    tensors = {name: torch.from_dlpack(tensor) for name, tensor in model.items()}
    model.close()
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        assert tensor.device.type == "cuda"
        assert np.array_equal(tensor.view(torch.int16).cpu().numpy(), expected[name].numpy().view(np.int16)), name


@pytest.mark.torch
async def test_torch_tensors_are_filled_in_place(model_path: Path, small: Options) -> None:
    torch: Any = pytest.importorskip("torch")

    expected = await load(model_path, device="host", dtype="f16", select="output_norm.weight")
    host = expected["output_norm.weight"].numpy()
    target = torch.full(host.shape, float("nan"), dtype=torch.float16, device="cuda")
    async with Loader("cuda", options=small) as loader:
        await loader.load(model_path, dtype="f16", select="output_norm.weight", into={"output_norm.weight": target})
    assert np.array_equal(target.cpu().numpy(), host)


@pytest.mark.cupy
async def test_cupy_has_the_tensors(model_path: Path) -> None:
    cupy: Any = pytest.importorskip("cupy")
    expected = await load(model_path, device="host", dtype="f16")
    model = await load(model_path, device="cuda", dtype="f16")
    for name, tensor in model.items():
        assert np.array_equal(cupy.asnumpy(cupy.from_dlpack(tensor)), expected[name].numpy()), name
        assert np.array_equal(cupy.asnumpy(cupy.asarray(tensor)), expected[name].numpy()), name


@pytest.mark.torch
async def test_a_target_that_kernels_cannot_store_to_is_filled_all_the_same(model_path: Path, small: Options) -> None:
    torch: Any = pytest.importorskip("torch")
    name = "blk.0.ffn_down.weight"
    host = (await load(model_path, device="host", dtype="f16", select=name))[name].numpy()
    room = torch.zeros(host.size + 8, dtype=torch.float16, device="cuda")
    target = room[1 : 1 + host.size].view(host.shape)
    async with Loader("cuda", options=small) as loader:
        model = await loader.load(model_path, dtype="f16", select=name, into={name: target})
        assert model.stats.bytes_uploaded == host.nbytes, "it was decoded before the bus"
    assert np.array_equal(target.cpu().numpy(), host)
    assert room[0] == 0
    assert (room[1 + host.size :] == 0).all()


async def test_packed_bytes_cross_the_bus_and_the_scratch_is_gone_afterwards(model_path: Path, small: Options) -> None:
    async with Loader("cuda", options=small) as loader:
        model = await loader.load(model_path, dtype="bf16")
        assert model.stats.bytes_uploaded == sum(info.nbytes for info in model.header.tensors.values())
        await run_in_thread(loader.tracker.flush)
        assert loader.tracker.by_purpose() == {Purpose.WEIGHTS: model.nbytes}


@pytest.mark.parametrize("dtype", ["packed", "bf16"])
async def test_cancelled_loads_leave_the_drivers_memory_as_it_was(model_path: Path, dtype: str, small: Options) -> None:
    rng = random.Random(0)
    async with Loader("cuda", options=small) as loader:
        expected = await loader.load(model_path, dtype=dtype)
        await run_in_thread(loader.tracker.flush)
        before = await run_in_thread(loader.device.memory)
        for _ in range(60):
            last, seen = rng.randrange(40), 0
            with anyio.CancelScope() as scope:

                def count(_: object, last: int = last, scope: anyio.CancelScope = scope) -> None:
                    nonlocal seen
                    seen += 1
                    if seen > last:
                        scope.cancel()

                (await loader.load(model_path, dtype=dtype, progress=count)).close()
            await run_in_thread(loader.tracker.flush)
            assert loader.tracker.by_purpose() == {Purpose.WEIGHTS: expected.nbytes}
            after = await run_in_thread(loader.device.memory)
            assert abs(after.free - before.free) <= DRIVERS_OWN
            assert loader._active().idle
        model = await loader.load(model_path, dtype=dtype)
        found = await run_in_thread(on_host, loader.device, model)
        assert found == await run_in_thread(on_host, loader.device, expected)


async def test_tensors_land_one_by_one(model_path: Path, small: Options) -> None:
    expected = await load(model_path, device="host")
    async with Loader("cuda", options=small) as loader:
        seen: dict[str, bytes] = {}
        async with loader.tensors(model_path, ahead=300_000) as tensors:
            async for tensor in tensors:
                seen.update(await run_in_thread(on_host, loader.device, {tensor.name: tensor}))
    assert seen == {name: tensor.numpy().tobytes() for name, tensor in expected.items()}


async def test_the_loop_ticks_while_the_driver_is_blocked(tmp_path: Path) -> None:
    """A 1 ms ticker during a load, while another thread allocates and registers without pause.

    A driver call on the loop's thread would wait for the other thread's: the loop is to be late by less than half of
    what one of those takes.
    """
    path = tmp_path / "model.gguf"
    await run_in_thread(synthesize, path, preset="llama-8b", quant="Q4_K_M", layers=1)
    stop, disturbing = threading.Event(), threading.Event()
    taken: list[float] = []

    def disturb() -> None:
        driver: Any = import_module("cuda.bindings.driver")
        device = open_device("cuda")
        device.attach()
        memory = mmap.mmap(-1, 1 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        array = np.frombuffer(memory, np.uint8)
        array[::4096] = 1
        while not stop.is_set():
            begin = time.perf_counter()
            assert driver.cuMemHostRegister(array.ctypes.data, array.nbytes, 0)[0] == driver.CUresult.CUDA_SUCCESS
            taken.append(time.perf_counter() - begin)
            disturbing.set()
            held = device.allocate(1 << 30)
            device.free(held)
            driver.cuMemHostUnregister(array.ctypes.data)

    late: list[float] = []

    async def tick() -> None:
        while True:
            begin = time.perf_counter()
            await anyio.sleep(0.001)
            late.append(time.perf_counter() - begin - 0.001)

    async with Loader("cuda") as loader:
        (await loader.load(path)).close()
        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            await run_in_thread(disturbing.wait)
            taken.clear()
            async with anyio.create_task_group() as group:
                group.start_soon(tick)
                while len(late) < 300:
                    (await loader.load(path)).close()
                    await run_in_thread(loader.tracker.flush)
                group.cancel_scope.cancel()
        finally:
            stop.set()
            await run_in_thread(thread.join)
    assert taken
    typical: Callable[[list[float]], float] = lambda values: sorted(values)[len(values) // 2]  # noqa: E731
    assert sorted(late)[int(len(late) * 0.99)] < typical(taken) / 2
