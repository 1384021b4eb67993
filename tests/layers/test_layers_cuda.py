"""Layers through slots of a real GPU: what is copied back on the compute stream behind slow work is the layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anyio
import pytest

from asyncload.device import Device
from asyncload.device._cuda import CudaDevice, CudaStream
from asyncload.errors import OptionsError
from asyncload.layers import Layer
from asyncload.loader import Loader
from asyncload.memory import Purpose
from asyncload.testing import SleepingKernel
from asyncload.threads import run_in_thread
from tests.layers.models import SMALL, Content, finish, layers_only, make_model, open_stream

pytestmark = [pytest.mark.gpu, pytest.mark.anyio]


@pytest.fixture(scope="module")
def kernel() -> Iterator[SleepingKernel]:
    kernel = SleepingKernel()
    yield kernel
    kernel.close()


ROOM = 64 << 20  # bytes: more than a sweep reads


class Reader:
    """Copies layers back to the host, by a stream and into pinned memory, so that nothing but the stream waits."""

    def __init__(self, device: CudaDevice, stream: Any) -> None:
        """Blocks."""
        device.attach()
        self._device = device
        self.stream: Any = stream
        self._download: CudaStream = device.adopt(stream)
        self._staging = device.staging(ROOM)
        self._copies: list[tuple[str, int, int]] = []
        self._used = 0

    def read(self, layer: Layer) -> None:
        """Enqueues the copies; inside of the layer's block."""
        for tensor in layer.values():
            self._download.download(self._staging.address + self._used, tensor.address, tensor.nbytes)
            self._copies.append((tensor.name, self._used, tensor.nbytes))
            self._used += tensor.nbytes

    def content(self) -> Content:
        """What was read since the last call, once it has come; blocks."""
        finish(self._device, self._download)
        found = {name: bytes(self._staging.view[at : at + nbytes]) for name, at, nbytes in self._copies}
        self._copies.clear()
        self._used = 0
        return found

    def sleep(self, kernel: SleepingKernel) -> None:
        """Lets the stream sleep for a little; blocks."""
        self._device.attach()
        with kernel.asleep(self.stream, seconds=0.002):
            pass

    def close(self) -> None:
        """Gives the memory back; blocks."""
        self._staging.close()


def cuda(device: Device) -> CudaDevice:
    assert isinstance(device, CudaDevice)
    return device


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["packed", "bf16"])
@pytest.mark.parametrize("host", ["slabs", "file"])
async def test_every_byte_of_every_sweep(
    tmp_path: Path, kernel: SleepingKernel, host: str, dtype: str, slots: int
) -> None:
    path, expected = await make_model(tmp_path / "model.gguf", 7, uneven=True, dtype=dtype)
    async with Loader("cuda:0", options=SMALL) as loader:
        async with open_stream(loader, path, dtype=dtype, slots=slots, host=host) as layers:
            reader = await run_in_thread(Reader, cuda(loader.device), kernel.stream())
            for _ in range(3):
                async for layer in layers:
                    with layer.on(reader.stream):
                        # Slow work: what comes next is enqueued while this kernel sleeps.
                        await run_in_thread(reader.sleep, kernel)
                        reader.read(layer)
                assert await run_in_thread(reader.content) == layers_only(expected)
            await run_in_thread(reader.close)
            found = loader.tracker.by_purpose()
            assert {name: size for name, size in found.items() if size > layers.plan.breakdown[name]} == {}
        await run_in_thread(loader.tracker.flush)
        assert loader.tracker.by_purpose().get(Purpose.SLOTS, 0) == loader.tracker.total == 0


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("host", ["slabs", "file"])
async def test_as_many_layers_as_slots_are_handed_out_while_work_is_under_way(
    tmp_path: Path, kernel: SleepingKernel, host: str, slots: int
) -> None:
    path, expected = await make_model(tmp_path / "model.gguf", 5, uneven=True, dtype="bf16")
    async with (
        Loader("cuda:0", options=SMALL) as loader,
        open_stream(loader, path, dtype="bf16", slots=slots, host=host) as layers,
    ):
        reader, ride = await run_in_thread(Reader, cuda(loader.device), kernel.stream()), layers.join()
        with ExitStack() as asleep:
            sleeping = asleep.enter_context(kernel.asleep(reader.stream))
            with anyio.fail_after(30):
                for number in range(slots):
                    layer = await anext(ride)
                    assert layer.number == number
                    with layer.on(reader.stream):
                        reader.read(layer)
            with anyio.move_on_after(0.05) as scope:
                await anext(ride)
            assert scope.cancelled_caught
            sleeping.wake()
        async for layer in ride:
            with layer.on(reader.stream):
                reader.read(layer)
        assert await run_in_thread(reader.content) == layers_only(expected)
        await run_in_thread(reader.close)


@pytest.mark.parametrize("host", ["slabs", "file"])
@pytest.mark.parametrize("dtype", ["packed", "bf16"])
async def test_a_pass_takes_what_its_copies_and_work_take(
    tmp_path: Path, kernel: SleepingKernel, host: str, dtype: str
) -> None:
    path, _ = await make_model(tmp_path / "model.gguf", 5, uneven=True, dtype=dtype)
    async with (
        Loader("cuda:0", options=SMALL) as loader,
        open_stream(loader, path, dtype=dtype, slots=2, host=host) as layers,
    ):
        reader = await run_in_thread(Reader, cuda(loader.device), kernel.stream())
        for _ in range(2):
            async for layer in layers:
                with layer.on(reader.stream):
                    await run_in_thread(reader.sleep, kernel)
            stats = await layers.last_pass()
            assert stats.nbytes == layers.plan.sweep_nbytes
            assert all(timing.compute > 0 for timing in stats.layers)
            assert stats.wall >= stats.lower_bound - 1e-6 > 0  # the device counts half microseconds
            for timing in stats.layers:
                copies = [span for stream in timing.copies for span in stream]
                assert all(begun <= arrived <= timing.work[0] + 1e-6 for begun, arrived in copies)
                chunks = len([*layers.plan.layers[timing.number].load.chunks()])
                assert host == "slabs" or len(copies) == chunks
        await run_in_thread(reader.close)


async def test_work_needs_a_stream(tmp_path: Path) -> None:
    path, _ = await make_model(tmp_path / "model.gguf", 2, uneven=False)
    async with Loader("cuda:0", options=SMALL) as loader, open_stream(loader, path) as layers:
        async for layer in layers:
            with pytest.raises(OptionsError), layer.on():
                pytest.fail("there is no stream")


@pytest.mark.torch
@pytest.mark.parametrize("own", [False, True])
async def test_torchs_current_stream_is_accepted(tmp_path: Path, *, own: bool) -> None:
    torch: Any = pytest.importorskip("torch")
    path, expected = await make_model(tmp_path / "model.gguf", 5, uneven=True, dtype="bf16")
    async with Loader("cuda:0", options=SMALL) as loader, open_stream(loader, path, dtype="bf16") as layers:
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
