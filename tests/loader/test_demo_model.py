"""Every tensor of the demo's real model, against the file and against gguf-py."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from asyncload.device import DeviceMemory
from asyncload.loader import Loader
from asyncload.model import Tensor
from asyncload.options import EngineOption, Options
from asyncload.threads import run_in_thread
from bench._demo_model import NAME, cache_folder

pytestmark = [pytest.mark.demo, pytest.mark.anyio]


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round-to-nearest-even; the model has finite weights only."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def check(device: Any, tensor: Tensor, data: NDArray[np.uint8]) -> None:
    found = bytearray(tensor.nbytes)
    device.download(DeviceMemory(tensor.address, tensor.nbytes), 0, memoryview(found))
    if tensor.dtype == "bfloat16":
        values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(int(tensor.type)))
        data = to_bf16(np.ascontiguousarray(values, np.float32).reshape(-1)).view(np.uint8)
    assert np.array_equal(np.frombuffer(found, np.uint8), data), tensor.name


@pytest.fixture
def anyio_backend() -> Any:
    """Once is enough for 268 million weights: the bytes do not depend on the loop."""
    return "asyncio", {"use_uvloop": True}


@pytest.mark.parametrize("dtype", ["packed", "bf16"])
@pytest.mark.parametrize("device", ["host", pytest.param("cuda:0", marks=pytest.mark.gpu)])
async def test_every_byte_is_what_gguf_py_gives(device: str, dtype: str, engine: EngineOption) -> None:
    path = cache_folder() / NAME
    async with Loader(device, options=Options(engine=engine)) as loader:
        model = await loader.load(path, dtype=dtype)
        assert len(model) == 236
        for tensor in model.values():
            info = model.header.tensors[tensor.name]
            data = np.fromfile(path, np.uint8, info.nbytes, offset=info.offset)
            await run_in_thread(check, loader.device, tensor, data)
