"""One file with a tensor of every type, through the whole way, against ggml's own values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from asyncload.device import DeviceMemory
from asyncload.errors import UnsupportedQuantError
from asyncload.gguf import GGMLType
from asyncload.loader import Loader
from asyncload.model import Model
from asyncload.options import DecodeOption, Options
from asyncload.quant import DType, native_dtype
from asyncload.testing import random_blocks, write_gguf
from asyncload.threads import run_in_thread
from tests.quant import oracle

pytestmark = [pytest.mark.anyio, pytest.mark.ggml]
INTEGERS = [type_ for type_ in GGMLType if type_.integer]
DTYPES = ["float32", "float16", "bfloat16"]


@pytest.fixture(scope="module")
def every_type(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The oracle's blocks, a block a row, so that rows are no multiples of 256 where blocks are not."""
    tensors: dict[str, tuple[GGMLType, tuple[int, ...], memoryview]] = {
        f"{type_.name.lower()}.weight": (
            type_,
            (len(oracle.blocks(type_)), type_.block_size),
            oracle.blocks(type_).data,
        )
        for type_ in oracle.STORED
    }
    integers = {type_: random_blocks(type_, 1001, seed=0) for type_ in INTEGERS}
    tensors |= {f"{type_.name.lower()}.weight": (type_, (1001,), data.data) for type_, data in integers.items()}
    tensors |= {
        f"{type_.name.lower()}.one": (type_, (1, type_.block_size), oracle.blocks(type_)[:1].data)
        for type_ in oracle.STORED
    }
    return write_gguf(tmp_path_factory.mktemp("types") / "every.gguf", tensors)


def check(loader: Loader, model: Model, path: Path, dtype: str) -> None:
    """Every element of every tensor."""
    for name, tensor in model.items():
        got = bytearray(tensor.nbytes)
        loader.device.download(DeviceMemory(tensor.address, tensor.nbytes), 0, memoryview(got))
        if tensor.type.integer:
            offset = model.header.tensors[name].offset
            assert bytes(got) == path.read_bytes()[offset : offset + tensor.nbytes], name
            assert tensor.dtype == native_dtype(tensor.type)
        else:
            assert tensor.dtype == dtype
            assert oracle.mistakes(tensor.type, DType(dtype), np.frombuffer(got, np.uint8)) == 0, name


async def load_and_check(device: str, path: Path, dtype: str, decode: DecodeOption, small: Options) -> None:
    async with Loader(device, options=replace(small, decode=decode)) as loader:
        model = await loader.load(path, dtype=dtype)
        assert {tensor.type for tensor in model.values()} == {*oracle.STORED, *INTEGERS}
        packed = sum(info.nbytes for info in model.header.tensors.values())
        assert model.stats.bytes_uploaded == (packed if decode == "device" else model.nbytes)
        await run_in_thread(check, loader, model, path, dtype)


@pytest.mark.parametrize("decode", ["host", "device"])
@pytest.mark.parametrize("dtype", DTYPES)
async def test_every_type_on_the_host(every_type: Path, dtype: str, decode: DecodeOption, small: Options) -> None:
    await load_and_check("host", every_type, dtype, decode, small)


@pytest.mark.gpu
@pytest.mark.parametrize("decode", ["host", "device"])
@pytest.mark.parametrize("dtype", DTYPES)
async def test_every_type_on_a_gpu(every_type: Path, dtype: str, decode: DecodeOption, small: Options) -> None:
    await load_and_check("cuda", every_type, dtype, decode, small)


@pytest.mark.parametrize("type_name", ["Q8_1", "Q8_K"])
async def test_what_is_never_stored_is_refused_by_name(tmp_path: Path, type_name: str, small: Options) -> None:
    type_ = GGMLType[type_name]
    data = bytes(type_.nbytes(256))
    path = await run_in_thread(write_gguf, tmp_path / "odd.gguf", {"odd.weight": (type_, (256,), data)})
    async with Loader("host", options=small) as loader:
        with pytest.raises(UnsupportedQuantError, match=f"odd.weight: {type_name} .* activations") as caught:
            await loader.load(path, dtype="bf16")
        assert (caught.value.tensor, caught.value.type, caught.value.dtype) == ("odd.weight", type_name, "bfloat16")
        assert (await loader.load(path)).nbytes == len(data)
