from __future__ import annotations

import errno
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

import asyncload
from asyncload.device import HostDevice
from asyncload.errors import (
    ClosedError,
    CopyError,
    OutOfDeviceMemoryError,
    PlanError,
    SourceChangedError,
    SourceNotFoundError,
    SourceReadError,
    SplitError,
    TargetError,
    TensorNotFoundError,
    UnsupportedQuantError,
)
from asyncload.events import Progress, ProgressStream
from asyncload.gguf import Header
from asyncload.loader import Loader, load, read_header
from asyncload.model import Model
from asyncload.options import DecodeOption, Options
from asyncload.source import MemorySource, open_source
from asyncload.testing import AsyncOnlySource, FaultySource, synthesize
from asyncload.threads import run_in_thread
from tests.loader.conftest import LATE_READ, LATE_READ_AS_BF16, FailingFile

pytestmark = pytest.mark.anyio


def blocks(path: Path, header: Header, name: str) -> NDArray[np.uint8]:
    info = header.tensors[name]
    return np.fromfile(path, np.uint8, info.nbytes, offset=info.offset)


def reference(path: Path, header: Header, name: str) -> NDArray[np.float32]:
    """What gguf-py decodes."""
    info = header.tensors[name]
    data = gguf.quants.dequantize(blocks(path, header, name), gguf.GGMLQuantizationType(int(info.type)))
    return np.asarray(data, np.float32).reshape(info.shape)


def bf16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round-to-nearest-even, for finite values."""
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def check_packed(model: Model, path: Path) -> None:
    for name, tensor in model.items():
        assert np.array_equal(tensor.numpy().reshape(-1).view(np.uint8), blocks(path, model.header, name)), name


async def test_packed_gives_the_bytes_of_the_file(model_path: Path, small: Options) -> None:
    async with Loader("host", options=small) as loader:
        model = await loader.load(model_path)
    header = await read_header(model_path)
    assert list(model) == list(header.tensors)
    check_packed(model, model_path)
    norm = model["output_norm.weight"]
    assert (norm.dtype, norm.shape) == ("float32", header.tensors["output_norm.weight"].shape)


@pytest.mark.parametrize("decode", ["host", "device"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
async def test_decoded_gives_what_gguf_py_gives(
    model_path: Path, dtype: str, decode: DecodeOption, small: Options
) -> None:
    model = await load(model_path, device="host", options=replace(small, decode=decode), dtype=dtype)
    bus = sum(info.nbytes for info in model.header.tensors.values()) if decode == "device" else model.nbytes
    assert (model.stats.bytes_uploaded, model.stats.nbytes) == (bus, model.nbytes)
    for name, tensor in model.items():
        expected = reference(model_path, model.header, name)
        assert tensor.dtype == dtype
        assert tensor.shape == expected.shape
        if dtype == "bfloat16":
            assert np.array_equal(tensor.numpy().view(np.uint16), bf16_bits(expected)), name
        else:
            assert np.array_equal(tensor.numpy(), expected.astype(dtype)), name


async def test_one_line_loads_into_the_default_device(model_path: Path) -> None:
    model = await asyncload.load(model_path, select="output_norm.weight")
    assert list(model) == ["output_norm.weight"]


async def test_select_takes_names_globs_and_layers(model_path: Path, small: Options) -> None:
    async with Loader("host", options=small) as loader:
        model = await loader.load(model_path, select=["*norm*", 0])
        assert set(model) == {name for name in model.header.tensors if "norm" in name or name.startswith("blk.0.")}
        check_packed(model, model_path)
        assert len(await loader.load(model_path, select=[])) == 0
        with pytest.raises(TensorNotFoundError):
            await loader.load(model_path, select="nothing")


async def test_a_type_without_a_kernel_is_refused_before_a_byte_moves(tmp_path: Path, small: Options) -> None:
    path = tmp_path / "all.gguf"
    await run_in_thread(synthesize, path, preset="tiny", quant="all")
    source = FaultySource(open_source(path), {})
    async with Loader("host", options=small) as loader:
        with pytest.raises(UnsupportedQuantError) as caught:
            await loader.load(source, dtype="bf16")
        assert caught.value.partial is None
        assert source.reads <= 2  # the header
        check_packed(await loader.load(path), path)
    source.close()


async def test_split_files_are_opened_by_any_part(tmp_path: Path, small: Options) -> None:
    paths = await run_in_thread(synthesize, tmp_path / "split.gguf", preset="tiny", quant="Q4_K_M", parts=3)
    assert len(paths) == 3
    for path in paths:
        model = await load(path, device="host", options=small)
        for name, tensor in model.items():
            info = model.header.tensors[name]
            data = np.fromfile(paths[info.part], np.uint8, info.nbytes, offset=info.offset)
            assert np.array_equal(tensor.numpy().reshape(-1).view(np.uint8), data), name


async def test_missing_parts_are_all_named(tmp_path: Path, small: Options) -> None:
    paths = await run_in_thread(synthesize, tmp_path / "split.gguf", preset="tiny", quant="Q4_0", parts=4)
    paths[1].unlink()
    paths[3].unlink()
    with pytest.raises(SplitError) as caught:
        await load(paths[2], device="host", options=small)
    assert [Path(part).name for part in caught.value.parts] == [paths[1].name, paths[3].name]


@pytest.mark.parametrize("kind", ["memory", "async only"])
async def test_other_sources(model_path: Path, kind: str, small: Options) -> None:
    source: Any = MemorySource(model_path.read_bytes())
    if kind == "async only":
        source = AsyncOnlySource(source)
    async with Loader("host", options=small) as loader:
        check_packed(await loader.load(source), model_path)


@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize("chunks", [0, 1, 3])
async def test_sizes_at_the_boundary_of_a_chunk(tmp_path: Path, chunks: int, extra: int, small: Options) -> None:
    size = chunks * small.chunk_size + extra
    if size < 0:
        return
    path = tmp_path / "sizes.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    data = np.random.default_rng(0).integers(-128, 127, size, np.int8)
    writer.add_tensor("a", data)
    writer.add_tensor("b", np.arange(3, dtype=np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    events: list[Progress] = []
    model = await load(path, device="host", options=small, progress=events.append)
    assert np.array_equal(model["a"].numpy(), data)
    assert np.array_equal(model["b"].numpy(), np.arange(3))
    assert events[-1].bytes_total == size + 12
    assert [event.fraction == 1.0 for event in events] == [False] * (len(events) - 1) + [True]


class TestInto:
    async def test_the_callers_buffers_are_filled(self, model_path: Path, small: Options) -> None:
        header = await read_header(model_path)
        names = ["output_norm.weight", "blk.0.attn_q.weight"]
        buffers: dict[str, NDArray[Any]] = {
            names[0]: np.full(header.tensors[names[0]].shape, np.nan, np.float32),
            names[1]: np.full(header.tensors[names[1]].nbytes, 255, np.uint8),
        }
        async with Loader("host", options=small) as loader:
            model = await loader.load(model_path, into=buffers)
            assert loader.tracker.total < model.nbytes
        for name in names:
            assert np.array_equal(buffers[name].reshape(-1).view(np.uint8), blocks(model_path, header, name))
            assert np.shares_memory(model[name].numpy(), buffers[name])
        check_packed(model, model_path)

    async def test_a_buffer_that_does_not_fit_is_refused(self, model_path: Path, small: Options) -> None:
        async with Loader("host", options=small) as loader:
            for wrong in (np.zeros(3, np.float32), np.zeros(1 << 20), b"read only"):
                with pytest.raises(TargetError) as caught:
                    await loader.load(model_path, into={"output_norm.weight": wrong})
                assert caught.value.tensor == "output_norm.weight"
            with pytest.raises(TensorNotFoundError):
                await loader.load(model_path, select=0, into={"output_norm.weight": np.zeros(3)})


class TestProgress:
    async def test_it_counts_up_to_one_hundred_percent_once(self, model_path: Path, small: Options) -> None:
        events: list[Progress] = []
        async with Loader("host", options=small) as loader:
            model = await loader.load(model_path, progress=events.append)
        assert [event.stage for event in events] == ["start", *["load"] * (len(events) - 2), "done"]
        done = [event.bytes_done for event in events]
        assert done == sorted(done)
        assert done[0] == 0
        assert done[-1] == events[-1].bytes_total == model.nbytes
        assert done.count(model.nbytes) == 1
        assert events[-1].tensors_done == events[-1].tensors_total == len(model)
        assert [event.fraction == 1.0 for event in events].count(True) == 1
        assert events[0].remaining is None
        assert events[-1].remaining == 0
        assert events[-1].rate > 0

    async def test_it_tells_of_what_has_moved_before_the_rest_moves(self, model_path: Path, small: Options) -> None:
        events: list[Progress] = []
        async with (
            Loader("host", options=small) as loader,
            loader.tensors(model_path, ahead=1, progress=events.append) as tensors,
        ):
            taken = 0
            async for tensor in tensors:
                taken += tensor.nbytes
                assert taken <= events[-1].bytes_done or taken == events[-1].bytes_total
        assert len({event.bytes_done for event in events}) > 10

    async def test_it_can_be_iterated(self, model_path: Path, small: Options) -> None:
        progress = ProgressStream()
        seen: list[Progress] = []

        async def watch() -> None:
            seen.extend([event async for event in progress])

        async with anyio.create_task_group() as group, Loader("host", options=small) as loader:
            group.start_soon(watch)
            await loader.load(model_path, progress=progress)
        assert seen[0].stage == "start"
        assert seen[-1].stage == "done"

    async def test_the_iteration_ends_when_the_load_fails(
        self, model_path: Path, small: Options, failing_file: FailingFile
    ) -> None:
        progress = ProgressStream()
        source = failing_file(model_path, {5: errno.EBADF})
        async with anyio.create_task_group() as group, Loader("host", options=small) as loader:

            async def watch() -> None:
                assert [event.stage async for event in progress][-1] != "done"

            group.start_soon(watch)
            with pytest.raises(SourceReadError) as caught:
                await loader.load(source, progress=progress)
            assert caught.value.partial is not None
            caught.value.partial.close()

    async def test_a_callback_that_raises_ends_the_load(
        self, model_path: Path, nothing_left: Any, small: Options, failing_file: FailingFile
    ) -> None:
        def refuse(progress: Progress) -> None:
            if progress.stage == "load":
                raise LookupError("enough")

        never_whole = failing_file(model_path, {9: errno.EIO})  # a chunk of it comes after an hour
        async with Loader("host", options=replace(small, retry_delay=3600.0)) as loader, nothing_left(loader):
            with pytest.raises(LookupError, match="enough"):
                await loader.load(never_whole, progress=refuse)

    async def test_start_and_end_are_logged(
        self, model_path: Path, caplog: pytest.LogCaptureFixture, small: Options
    ) -> None:
        with caplog.at_level(logging.INFO, "asyncload.load"):
            await load(model_path, device="host", options=small)
        messages = [record.getMessage() for record in caplog.records if record.name == "asyncload.load"]
        assert len(messages) == 2
        assert "loading" in messages[0]
        assert "loaded" in messages[1]


class TestFailures:
    async def test_a_read_that_fails_for_a_passing_reason_is_made_again(
        self, model_path: Path, small: Options, failing_file: FailingFile
    ) -> None:
        source = failing_file(model_path, dict.fromkeys((4, 5, 9), errno.EIO))
        async with Loader("host", options=small) as loader:
            model = await loader.load(source)
        check_packed(model, model_path)
        assert model.stats.retries == 3

    async def test_the_policy_bounds_the_retries(
        self, model_path: Path, nothing_left: Any, small: Options, failing_file: FailingFile
    ) -> None:
        source = failing_file(model_path, dict.fromkeys(range(4, 1000), errno.EIO))
        async with Loader("host", options=small) as loader, nothing_left(loader):
            with pytest.raises(SourceReadError) as caught:
                await loader.load(source)
            assert caught.value.partial is not None
            caught.value.partial.close()
            await run_in_thread(loader.tracker.flush)

    @pytest.mark.parametrize("dtype", ["packed", "bf16"])
    async def test_a_failed_load_is_resumed_without_moving_what_arrived(
        self, model_path: Path, dtype: str, small: Options, failing_file: FailingFile
    ) -> None:
        async with Loader("host", options=small) as loader:
            expected = await loader.load(model_path, dtype=dtype)
            source = failing_file(model_path, {LATE_READ if dtype == "packed" else LATE_READ_AS_BF16: errno.EBADF})
            with pytest.raises(SourceReadError) as caught:
                await loader.load(source, dtype=dtype)
            partial = caught.value.partial
            assert partial is not None
            assert 0 < len(partial.names) < len(expected)
            assert f"{len(partial.names)} of {len(expected)} tensors had arrived" in caught.value.__notes__[-1]
            addresses = {name: tensor.address for name, tensor in partial.tensors.items()}
            events: list[Progress] = []
            model = await loader.load(source, dtype=dtype, resume=partial, progress=events.append)
            assert partial.closed
            assert list(model) == list(expected)
            for name, tensor in model.items():
                assert np.array_equal(tensor.numpy(), expected[name].numpy()), name
            assert {name: model[name].address for name in addresses} == addresses
            assert events[0].bytes_done == events[0].bytes_resumed == partial.nbytes
            assert model.stats.bytes_uploaded == model.nbytes - partial.nbytes
            with pytest.raises(ClosedError):
                await loader.load(source, dtype=dtype, resume=partial)

    async def test_a_partial_belongs_to_its_file_and_dtype(
        self, model_path: Path, tmp_path: Path, small: Options, failing_file: FailingFile
    ) -> None:
        async with Loader("host", options=small) as loader:
            source = failing_file(model_path, {LATE_READ: errno.EBADF})
            with pytest.raises(SourceReadError) as caught:
                await loader.load(source)
            partial = caught.value.partial
            assert partial is not None
            with pytest.raises(PlanError, match="arrived as"):
                await loader.load(source, dtype={partial.names[0]: "f16"}, resume=partial)
            elsewhere = np.zeros(partial.tensors[partial.names[0]].shape, partial.tensors[partial.names[0]].dtype)
            with pytest.raises(PlanError, match="arrived elsewhere"):
                await loader.load(source, into={partial.names[0]: elsewhere}, resume=partial)
            other = tmp_path / "other.gguf"
            other.write_bytes(model_path.read_bytes())
            with pytest.raises(SourceChangedError):
                await loader.load(other, resume=partial)
            partial.close()

    async def test_a_failing_copy_is_a_typed_error(self, model_path: Path, nothing_left: Any, small: Options) -> None:
        device = HostDevice()
        async with Loader(device, options=small) as loader, nothing_left(loader):
            device.fail_upload(7)
            with pytest.raises(CopyError) as caught:
                await loader.load(model_path)
            assert caught.value.tensor in (await read_header(model_path)).tensors
            assert caught.value.partial is not None
            caught.value.partial.close()
            await run_in_thread(loader.tracker.flush)

    async def test_too_little_memory_is_said_before_a_byte_moves(self, model_path: Path, small: Options) -> None:
        async with Loader(HostDevice(total_bytes=1 << 20), options=small) as loader:
            with pytest.raises(OutOfDeviceMemoryError) as caught:
                await loader.load(model_path)
            assert isinstance(caught.value, MemoryError)
            assert caught.value.needed > 0
            assert caught.value.breakdown["weights"] > 0
            await run_in_thread(loader.tracker.flush)
            assert loader.tracker.total == 0

    def touch(self, path: Path) -> None:
        os.utime(path, ns=(5, 5))

    def truncate(self, path: Path) -> None:
        os.truncate(path, 300_000)

    def remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def replace(self, path: Path) -> None:
        other = path.with_suffix(".other")
        other.write_bytes(path.read_bytes())
        other.rename(path)

    @pytest.mark.parametrize("how", ["touch", "truncate", "remove", "replace"])
    async def test_a_file_that_changes_meanwhile_is_noticed(
        self, tmp_path: Path, model_path: Path, small: Options, how: str
    ) -> None:
        path = tmp_path / "changing.gguf"
        path.write_bytes(model_path.read_bytes())

        def change(nbytes: int) -> None:  # it is called when the file has been opened, before any of it is moved
            getattr(self, how)(path)

        async with Loader(HostDevice(on_allocate=change), options=small) as loader:
            with pytest.raises(SourceChangedError) as caught:
                await loader.load(path)
            assert caught.value.url == str(path)
            assert caught.value.partial is not None
            caught.value.partial.close()

    async def test_a_missing_file(self, small: Options) -> None:
        async with Loader("host", options=small) as loader:
            with pytest.raises(SourceNotFoundError):
                await loader.load("/absent.gguf")


class TestLife:
    async def test_a_model_outlives_its_loader(self, model_path: Path, small: Options) -> None:
        async with Loader("host", options=small) as loader:
            model = await loader.load(model_path)
        check_packed(model, model_path)
        view = model["output_norm.weight"].numpy()
        copy = view.copy()
        model.close()
        assert np.array_equal(view, copy)

    async def test_closing_a_model_frees_its_memory(self, model_path: Path, small: Options) -> None:
        async with Loader("host", options=small) as loader:
            model = await loader.load(model_path)
            assert loader.tracker.total == model.nbytes
            model.close()
            await run_in_thread(loader.tracker.flush)
            assert loader.tracker.total == 0

    async def test_a_loader_is_used_inside_its_block(self, model_path: Path, small: Options) -> None:
        loader = Loader("host", options=small)
        with pytest.raises(ClosedError):
            await loader.load(model_path)
        async with loader:
            with pytest.raises(ClosedError):
                await loader.__aenter__()
        with pytest.raises(ClosedError):
            await loader.load(model_path)

    async def test_entered_in_one_task_and_left_in_another(self, model_path: Path, small: Options) -> None:
        loader = Loader("host", options=small)
        async with anyio.create_task_group() as group:
            group.start_soon(loader.__aenter__)
        model = await loader.load(model_path)
        async with anyio.create_task_group() as group:
            group.start_soon(loader.__aexit__, None, None, None)
        check_packed(model, model_path)

    async def test_many_loads_at_once_share_one_budget(self, model_path: Path, small: Options) -> None:
        models: list[Model] = []
        async with Loader("host", options=small) as loader:

            async def one(dtype: str) -> None:
                models.append(await loader.load(model_path, dtype=dtype))

            async with anyio.create_task_group() as group:
                for dtype in ["packed", "bf16"] * 4:
                    group.start_soon(one, dtype)
            assert len(models) == 8
            for model in models:
                if model["blk.0.attn_q.weight"].packed:
                    check_packed(model, model_path)

    async def test_leaving_the_block_ends_loads_that_run(self, model_path: Path, small: Options) -> None:
        slow = HostDevice(bandwidth=1e6)
        async with anyio.create_task_group() as group, Loader(slow, options=small) as loader:
            started = anyio.Event()

            async def one() -> None:
                with pytest.raises(ClosedError):
                    await loader.load(model_path, progress=lambda _: started.set())

            group.start_soon(one)
            await started.wait()


async def test_a_small_load_beside_a_large_one_gets_its_share(tmp_path: Path) -> None:
    """While the small one has chunks in line, the large one moves at most twice its bytes.

    By the Python engine. The C++ one's jobs are shown to share alike in tests/native/test_engine.py.
    """
    options = Options(engine="python", chunk_size=64 << 10, staging=512 << 10, threads=2, streams=2)
    large, small = tmp_path / "large.gguf", tmp_path / "small.gguf"
    for path, size in ((large, 48 << 20), (small, 4 << 20)):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tensor("a", np.zeros(size, np.int8))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    moved = {large: 0, small: 0}
    found: list[tuple[int, int]] = []  # of both at once
    started = {large: anyio.Event(), small: anyio.Event()}

    async with Loader(HostDevice(bandwidth=100e6), options=options) as loader, anyio.create_task_group() as group:

        async def load(path: Path) -> None:
            def watch(progress: Progress) -> None:
                moved[path] = progress.bytes_done
                started[path].set()
                # its last chunks are in no line: one that a thread is slow with would not hold the large one up
                if path == small and progress.bytes_done <= progress.bytes_total - options.staging:
                    found.append((moved[large], moved[small]))

            (await loader.load(path, progress=watch)).close()

        async def go_on_together() -> None:
            workers: list[Any] = loader._active().python.streams
            holds = [worker._stream.hold() for worker in workers]
            try:
                await started[small].wait()
            finally:
                for hold in holds:
                    hold.set()

        group.start_soon(go_on_together)
        group.start_soon(load, large)
        await started[large].wait()
        await load(small)
        beside, whole = found[-1]
        assert beside <= 2 * whole
        group.cancel_scope.cancel()
