"""What the engines promise beside a load's bytes: which one serves, what its failures say, and what it costs Python."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import anyio
import pytest

import asyncload
from asyncload.device import HostDevice
from asyncload.device._host_stream import HostStream
from asyncload.errors import CopyError, DeviceError, OutOfDeviceMemoryError, SourceReadError
from asyncload.events import Progress
from asyncload.gguf import GGMLType
from asyncload.loader import Loader, read_header
from asyncload.options import DecodeOption, EngineOption, Options
from asyncload.pipeline._native import NativeTransfer
from asyncload.plan import plan_load
from asyncload.source import MemorySource, NativeFileSource
from asyncload.testing import random_blocks, synthesize, write_gguf
from asyncload.threads import run_in_thread
from tests.loader.conftest import FailingFile
from tests.native.jobs import job_table
from tests.system_threads import system_threads

pytestmark = pytest.mark.anyio
PACKAGE = str(Path(asyncload.__file__).parent) + os.sep


async def test_files_are_read_by_the_engine_that_was_asked_for(
    model_path: Path, small: Options, engine: EngineOption
) -> None:
    async with Loader("host", options=small) as loader:
        await loader.load(model_path)
        opened = loader._active()
        assert (opened._native is not None, opened._python is None) == (engine == "native", engine == "native")
        await loader.load(MemorySource(model_path.read_bytes()))
        assert opened._python is not None


async def test_a_load_says_how_its_file_was_read(model_path: Path, small: Options, engine: EngineOption) -> None:
    expected = {"python": "by Python, from FileSource", "native": "pread: too small to measure"}
    async with Loader("host", options=small) as loader:
        assert (await loader.load(model_path)).stats.reading == expected[engine]
        source = MemorySource(model_path.read_bytes())
        assert (await loader.load(source)).stats.reading == "by Python, from MemorySource"


@pytest.mark.native
@pytest.mark.nowait
async def test_a_load_says_that_its_file_was_in_the_page_cache(tmp_path: Path) -> None:
    size = 64 << 20  # that is not too small to ask
    path = await run_in_thread(write_gguf, tmp_path / "model.gguf", {"tensor": (GGMLType.I8, (size,), bytes(size))})
    async with Loader("host", options=Options(engine="native")) as loader:
        assert (await loader.load(path)).stats.reading == "pread: in the page cache"


async def test_a_closed_loader_leaves_no_thread(model_path: Path, small: Options) -> None:
    def left() -> bool:
        return any(name.startswith(("asyncload-work", "asyncload-host")) for name in system_threads().values())

    async with Loader("host", options=small) as loader:
        (await loader.load(model_path)).close()
    with anyio.fail_after(20):  # the system counts a thread a little longer than it runs
        while await run_in_thread(left):
            await anyio.sleep(0.001)


def _returning(value: object) -> Callable[..., object]:
    def function(*_: object) -> object:
        return value

    return function


async def chunks_of(path: Path, options: Options) -> dict[int, str]:
    """Where in the file the chunks of a load begin, with the first tensor of each."""
    plan = plan_load(await read_header(path), chunk_size=options.chunk_size)
    if options.engine == "python":
        return {chunk.offset: plan.tensors[chunk.segments[0].tensor].info.name for chunk in plan.chunks()}
    from asyncload_native import cut

    chunks = cut(job_table(plan), plan.chunk_size, options.threads)
    return {offset: plan.tensors[segments[0][0]].info.name for *_, offset, _, segments in chunks}


class TestFailures:
    async def test_of_a_read_say_where_and_why(
        self, model_path: Path, small: Options, failing_file: FailingFile
    ) -> None:
        source = failing_file(model_path, {20: errno.EBADF})
        async with Loader("host", options=small) as loader:
            with pytest.raises(SourceReadError) as caught:
                await loader.load(source)
        error = caught.value
        assert str(error) == f"{model_path}: {os.strerror(errno.EBADF)}"
        assert (error.url, error.errno, error.transient) == (str(model_path), errno.EBADF, False)
        assert (error.offset, error.tensor) in (await chunks_of(model_path, small)).items()
        assert error.partial is not None
        error.partial.close()

    async def test_of_reads_in_passing_say_that_they_may_pass(
        self, model_path: Path, small: Options, failing_file: FailingFile
    ) -> None:
        source = failing_file(model_path, dict.fromkeys(range(5, 1000), errno.EIO))
        async with Loader("host", options=small) as loader:
            with pytest.raises(SourceReadError) as caught:
                await loader.load(source)
        assert (caught.value.errno, caught.value.transient) == (errno.EIO, True)
        assert (caught.value.offset, caught.value.tensor) in (await chunks_of(model_path, small)).items()

    async def test_of_copies_name_the_device_and_a_tensor_and_say_where(self, model_path: Path, small: Options) -> None:
        device = HostDevice()
        async with Loader(device, options=small) as loader:
            device.fail_upload(9)
            with pytest.raises(CopyError, match=r"host: a copy .*failed, as a test asked") as caught:
                await loader.load(model_path)
        error = caught.value
        assert (error.device, error.code, error.layer) == ("host", None, None)
        assert (error.offset, error.tensor) in (await chunks_of(model_path, small)).items()

    @pytest.mark.parametrize("engine", ["python"])
    async def test_of_a_kernel_in_python_name_a_tensor(
        self, model_path: Path, small: Options, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def decode(*_: object) -> None:
            raise DeviceError("host: the decoding kernel failed", device="host")

        async with Loader("host", options=replace(small, decode="device")) as loader:
            monkeypatch.setattr(HostStream, "decode", decode)
            with pytest.raises(DeviceError, match="decoding kernel failed") as caught:
                await loader.load(model_path, dtype="bf16")
        assert caught.value.tensor in (await read_header(model_path)).tensors
        assert caught.value.offset

    @pytest.mark.native
    @pytest.mark.parametrize("decode", ["host", "device"])
    @pytest.mark.parametrize("result", [0, 2, -1])
    async def test_of_a_kernel_in_cpp_name_a_tensor(
        self, model_path: Path, nothing_left: Any, monkeypatch: pytest.MonkeyPatch, decode: DecodeOption, result: int
    ) -> None:
        """Anything but 1 is an error."""
        kernel = ctypes.CFUNCTYPE(ctypes.c_int32, *3 * [ctypes.c_ssize_t])(lambda *_: result)
        address = ctypes.cast(kernel, ctypes.c_void_p).value
        options = Options(engine="native", chunk_size=64 << 10, threads=2, decode=decode)
        async with Loader("host", options=options) as loader:
            monkeypatch.setattr("asyncload.pipeline._native.kernel_address", _returning(address))
            monkeypatch.setattr(HostDevice, "native_kernel", _returning((address, 1)))
            async with nothing_left(loader):
                with pytest.raises(DeviceError, match="decoding kernel failed") as caught:
                    await loader.load(model_path, dtype="bf16")
                assert type(caught.value) is DeviceError
                assert caught.value.tensor in (await read_header(model_path)).tensors
                assert caught.value.offset
                assert caught.value.partial is not None
                caught.value.partial.close()
                await run_in_thread(loader.tracker.flush)

    @pytest.mark.native
    async def test_of_a_compiled_kernel_that_raises_are_errors(
        self, model_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Numba tells of what its C function raises, and returns 0."""
        numba: Any = import_module("numba")
        raised: list[type[BaseException] | None] = []

        def note(unraisable: sys.UnraisableHookArgs) -> None:
            raised.append(unraisable.exc_type)

        monkeypatch.setattr(sys, "unraisablehook", note)

        def divide(source: int, target: int, n_blocks: int) -> int:
            return source // (target - target + n_blocks - n_blocks)

        kernel = numba.cfunc("int32(intp, intp, intp)")(divide)

        options = Options(engine="native", decode="host", threads=2)
        async with Loader("host", options=options) as loader:
            monkeypatch.setattr("asyncload.pipeline._native.kernel_address", _returning(kernel.address))
            with pytest.raises(DeviceError, match="decoding kernel failed"):
                await loader.load(model_path, dtype="bf16")
        assert set(raised) == {ZeroDivisionError}

    async def test_of_an_allocation_while_the_first_tensors_move(
        self, model_path: Path, nothing_left: Any, small: Options
    ) -> None:
        device = HostDevice(bandwidth=20e6, poison=True)
        most = (await read_header(model_path)).nbytes * 3 // 4

        def refuse(nbytes: int) -> None:
            if device.info.total_bytes - device.memory().free + nbytes > most:
                raise OutOfDeviceMemoryError("full", device="host", needed=nbytes, available=0, breakdown={})

        events: list[Progress] = []
        async with Loader(device, options=small) as loader, nothing_left(loader):
            device.on_allocate = refuse
            with pytest.raises(OutOfDeviceMemoryError) as caught:
                await loader.load(model_path, progress=events.append)
            assert caught.value.breakdown["weights"] > 0
            assert caught.value.partial is None
            assert events == []
            device.on_allocate = None
            (await loader.load(model_path)).close()
            await run_in_thread(loader.tracker.flush)


@pytest.mark.native
async def test_a_chunk_that_is_decoded_in_several_calls_is_the_same(tmp_path: Path) -> None:
    n_blocks = (3 << 20) // GGMLType.Q4_K.type_size
    content = random_blocks(GGMLType.Q4_K, n_blocks, seed=1).tobytes()
    shape = (n_blocks, GGMLType.Q4_K.block_size)
    path = await run_in_thread(write_gguf, tmp_path / "large.gguf", {"a": (GGMLType.Q4_K, shape, content)})
    decoded: list[bytes] = []
    engines: tuple[EngineOption, ...] = ("native", "python")
    for engine in engines:
        async with Loader("host", options=Options(engine=engine, chunk_size=4 << 20)) as loader:
            with await loader.load(path, dtype="f32") as model:
                decoded.append(await run_in_thread(model["a"].numpy().tobytes))
    assert decoded[0] == decoded[1]


@pytest.mark.native
@pytest.mark.parametrize("engine", ["native"])
async def test_the_native_engine_moves_tensors_while_others_have_no_memory_yet(
    model_path: Path, nothing_left: Any, small: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfers: list[NativeTransfer] = []

    def recipient(transfer: NativeTransfer, tensors: Sequence[int]) -> Any:
        transfers.append(transfer)
        return make(transfer, tensors)

    make = NativeTransfer.recipient
    monkeypatch.setattr(NativeTransfer, "recipient", recipient)
    left = len((await read_header(model_path)).tensors)

    def wait_for_the_first(_nbytes: int) -> None:
        nonlocal left
        left -= 1
        deadline = time.monotonic() + 60
        while not left and not transfers[0].stats().stages["upload"].nbytes:
            assert time.monotonic() < deadline, "nothing moves"

    device = HostDevice()
    async with Loader(device, options=small) as loader, nothing_left(loader):
        device.on_allocate = wait_for_the_first
        (await loader.load(model_path)).close()
        await run_in_thread(loader.tracker.flush)
    assert left == 0


@pytest.mark.native
async def test_a_header_of_hundreds_of_tensors_is_read_as_the_file_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the interpreter lock is not given up once more for it."""
    (path,) = await run_in_thread(
        partial(synthesize, tmp_path / "model.gguf", preset="tiny", layers=78, vocabulary=1024)
    )
    monkeypatch.delattr(NativeFileSource, "read_into_blocking")
    assert len((await read_header(path)).tensors) > 700


@pytest.mark.native
class TestPythonRuns:
    @pytest.fixture
    def calls(self) -> Iterator[Counter[str]]:
        """Counts the calls of Python functions on this thread, and on those that begin from now on."""
        calls: Counter[str] = Counter()

        def count(frame: FrameType, event: str, _argument: object) -> None:
            # its own only: how often an event loop wakes for nothing, and what that takes, is not asyncload's affair
            calls["now"] += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

        threading.setprofile(count)
        sys.setprofile(count)
        yield calls
        sys.setprofile(None)
        threading.setprofile(None)

    async def test_not_for_a_chunk(self, tmp_path: Path, calls: Counter[str]) -> None:
        """A model of sixteen times the chunks takes as many functions, but for waking up once or twice more."""
        options = Options(engine="native", chunk_size=64 << 10, threads=2)
        found: dict[int, int] = {}
        for chunks in (64, 1024):
            size = chunks // 4 * options.chunk_size
            tensors = {f"tensor{index}": (GGMLType.I8, (size,), bytes(size)) for index in range(4)}
            path = await run_in_thread(write_gguf, tmp_path / "model.gguf", tensors)
            async with Loader("host", options=options) as loader:
                (await loader.load(path)).close()  # makes imports, caches and threads
                await run_in_thread(loader.tracker.flush)
                before = calls["now"]
                model = await loader.load(path)
                found[chunks] = calls["now"] - before
                assert model.stats.bytes_uploaded == 4 * size
        assert found[64] > 100, "they are counted"
        assert abs(found[1024] - found[64]) < 100
