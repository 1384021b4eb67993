"""Where a load's tensors are decoded, and what that takes on the device."""

from __future__ import annotations

import ctypes
import errno
import itertools
import logging
import threading
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncload.device import DeviceInfo, HostDevice
from asyncload.errors import BackendUnavailableError, CopyError, OutOfDeviceMemoryError, SourceReadError, TargetError
from asyncload.events import Progress
from asyncload.gguf import GGMLType
from asyncload.loader import Loader, load
from asyncload.memory import Purpose, Scratch
from asyncload.options import EngineOption, Options
from asyncload.quant import DType, decode, kernel_address
from asyncload.testing import random_blocks, write_gguf
from asyncload.threads import run_in_thread
from tests.loader.conftest import FailingFile

pytestmark = pytest.mark.anyio
HostKernel = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_ssize_t, ctypes.c_ssize_t, ctypes.c_ssize_t)


@pytest.fixture
def on_device(small: Options) -> Options:
    return replace(small, decode="device")


class WithoutCompiler(HostDevice):
    """A device that calls itself CUDA's, and has no compiler."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Collection[tuple[GGMLType, DType]]] = []

    @property
    def info(self) -> DeviceInfo:
        return replace(super().info, name="cuda:0", kind="cuda")

    def prepare(self, pairs: Collection[tuple[GGMLType, DType]]) -> None:
        self.asked.append(pairs)
        raise BackendUnavailableError("there is no NVRTC", device="cuda:0")


async def test_without_a_compiler_the_host_decodes(
    model_path: Path, caplog: pytest.LogCaptureFixture, on_device: Options
) -> None:
    device = WithoutCompiler()
    async with Loader(device, options=replace(on_device, decode="auto")) as loader:
        with caplog.at_level(logging.WARNING, "asyncload.load"):
            model = await loader.load(model_path, dtype="bf16")
        assert model.stats.bytes_uploaded == model.nbytes
        assert "decoding on the host" in caplog.text
        assert "NVRTC" in caplog.text
        assert (GGMLType.Q4_K, DType.BFLOAT16) in device.asked[0]


async def test_where_the_device_was_asked_for_that_is_an_error(model_path: Path, on_device: Options) -> None:
    async with Loader(WithoutCompiler(), options=on_device) as loader:
        with pytest.raises(BackendUnavailableError):
            await loader.load(model_path, dtype="bf16")


async def test_a_packed_load_needs_no_compiler(model_path: Path, on_device: Options) -> None:
    async with Loader(WithoutCompiler(), options=on_device) as loader:
        assert (await loader.load(model_path)).stats.nbytes > 0


async def test_scratch_is_there_while_loads_run_and_once_for_all_of_them(
    model_path: Path, nothing_left: Any, on_device: Options
) -> None:
    seen: set[int] = set()
    async with Loader(HostDevice(bandwidth=100e6), options=on_device) as loader, nothing_left(loader):

        def look(_: Progress) -> None:
            seen.add(loader.tracker.by_purpose().get(Purpose.SCRATCH, 0))

        async with loader.tensors(model_path, dtype="bf16") as tensors:
            first = await anext(tensors)
            (await loader.load(model_path, dtype="bf16", progress=look)).close()
            first.close()
        await run_in_thread(loader.tracker.flush)
    assert max(seen) == on_device.scratch


async def test_scratch_is_unused_once_a_load_has_seen_all_of_its_work_end(
    model_path: Path,
    on_device: Options,
    engine: EngineOption,
    failing_file: FailingFile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[bool] = []
    release = Scratch.release

    def note(scratch: Scratch, *, unused: bool = False) -> None:
        said.append(unused)
        release(scratch, unused=unused)

    monkeypatch.setattr(Scratch, "release", note)
    async with Loader("host", options=on_device) as loader:
        (await loader.load(model_path, dtype="bf16")).close()
        with pytest.raises(SourceReadError) as caught:
            await loader.load(failing_file(model_path, {20: errno.EBADF}), dtype="bf16")
        if caught.value.partial is not None:
            caught.value.partial.close()
    # Where a load has failed, Python does not know of the work whose end could not be recorded; C++ has waited for it.
    assert said == [True, engine == "native"]


async def test_a_packed_load_takes_no_scratch(model_path: Path, on_device: Options) -> None:
    sizes: list[int] = []
    async with Loader(HostDevice(on_allocate=sizes.append), options=on_device) as loader:
        model = await loader.load(model_path)
    assert sum(sizes) == model.nbytes


async def test_no_room_for_the_weights_beside_the_scratch_is_said_before_the_load_begins(
    model_path: Path, nothing_left: Any, on_device: Options
) -> None:
    nbytes = (await load(model_path, device="host", options=on_device, dtype="bf16")).nbytes
    device = HostDevice(total_bytes=nbytes + on_device.scratch - 1)
    async with Loader(device, options=on_device) as loader, nothing_left(loader):
        events: list[Progress] = []
        with pytest.raises(OutOfDeviceMemoryError) as caught:
            await loader.load(model_path, dtype="bf16", progress=events.append)
        assert caught.value.breakdown["scratch"] == on_device.scratch
        assert caught.value.breakdown["weights"] + caught.value.needed == nbytes, "it was the last one"
        assert caught.value.partial is None
        assert events == []


@pytest.mark.parametrize("refused", [False, True])
async def test_a_copy_that_fails_ends_the_load(
    model_path: Path, nothing_left: Any, *, refused: bool, on_device: Options
) -> None:
    device = HostDevice(poison=True)
    async with Loader(device, options=on_device) as loader, nothing_left(loader):
        expected = await loader.load(model_path, dtype="bf16")
        device.fail_upload(5, refused=refused)
        with pytest.raises(CopyError) as caught:
            await loader.load(model_path, dtype="bf16")
        assert caught.value.tensor is not None
        assert caught.value.partial is not None
        model = await loader.load(model_path, dtype="bf16", resume=caught.value.partial)
        for name, tensor in expected.items():
            assert np.array_equal(model[name].numpy().view(np.uint16), tensor.numpy().view(np.uint16)), name
        model.close()
        expected.close()
        await run_in_thread(loader.tracker.flush)


async def test_a_buffer_of_the_callers_is_decoded_into(model_path: Path, on_device: Options) -> None:
    name = "blk.0.ffn_down.weight"
    expected = (await load(model_path, device="host", dtype="f16", select=name))[name].numpy()
    room = np.zeros(expected.nbytes + 64, np.uint8)
    aligned = -room.ctypes.data % 16
    target = room[aligned : aligned + expected.nbytes].view(np.float16).reshape(expected.shape)
    await load(model_path, device="host", options=on_device, dtype="f16", select=name, into={name: target})
    assert np.array_equal(target, expected)
    shifted = room[aligned + 2 : aligned + 2 + expected.nbytes].view(np.float16).reshape(expected.shape)
    with pytest.raises(TargetError, match="16") as caught:
        await load(model_path, device="host", options=on_device, dtype="f16", select=name, into={name: shifted})
    assert caught.value.tensor == name
    assert np.array_equal(target, expected), "nothing was written"


async def test_one_large_tensor_is_decoded_by_all_workers_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_device: Options
) -> None:
    """Two of its pieces meet in the decoder: neither goes on before the other is there."""
    path = tmp_path / "embedding.gguf"
    packed = random_blocks(GGMLType.Q8_0, 262_144 * 2, seed=0)
    await run_in_thread(write_gguf, path, {"token_embd.weight": (GGMLType.Q8_0, (262_144, 64), packed.data)})
    both, calls = threading.Barrier(2, timeout=60), itertools.count()

    def meet() -> None:
        if next(calls) < 2:
            both.wait()

    def decode_together(*arguments: Any) -> None:
        meet()
        decode(*arguments)

    def address_together(*kernel: Any) -> int:
        decode_natively = HostKernel(kernel_address(*kernel))

        def call(source: int, target: int, count: int) -> int:
            meet()
            return int(decode_natively(source, target, count))

        kept.append(function := HostKernel(call))
        return ctypes.cast(function, ctypes.c_void_p).value or 0

    kept: list[object] = []
    monkeypatch.setattr("asyncload.pipeline._python_transfer.decode", decode_together)
    monkeypatch.setattr("asyncload.pipeline._native.kernel_address", address_together)
    model = await load(path, device="host", options=replace(on_device, decode="host"), dtype="f32")
    wanted = bytearray(262_144 * 64 * 4)
    await run_in_thread(decode, GGMLType.Q8_0, DType.FLOAT32, packed.data, memoryview(wanted))
    assert model["token_embd.weight"].numpy().tobytes() == bytes(wanted)
    assert next(calls) >= 2
