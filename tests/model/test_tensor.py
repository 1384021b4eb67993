"""What a tensor says about itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from asyncload.device import DeviceInfo
from asyncload.errors import RangeError
from asyncload.gguf import GGMLType
from asyncload.model import Tensor
from asyncload.quant import DType

MakeTensor = Callable[..., Tensor]


def test_a_decoded_tensor(make_tensor: MakeTensor, host: DeviceInfo) -> None:
    tensor = make_tensor((3, 4), DType.BFLOAT16)
    assert (tensor.name, tensor.shape, tensor.logical_shape) == ("blk.3.attn_q.weight", (3, 4), (3, 4))
    assert (tensor.dtype, tensor.type, tensor.packed) == (DType.BFLOAT16, GGMLType.BF16, False)
    assert (tensor.nbytes, tensor.device) == (24, host)


def test_packed_blocks(host: DeviceInfo, host_memory: Callable[[bytes], Any]) -> None:
    tensor = Tensor(
        "output.weight",
        shape=(2, 68),
        logical_shape=(2, 64),
        dtype=DType.UINT8,
        type=GGMLType.Q8_0,
        device=host,
        memory=host_memory(bytes(136)),
    )
    assert tensor.packed
    assert (tensor.nbytes, tensor.numpy().shape) == (136, (2, 68))


@pytest.mark.parametrize(
    ("shape", "nbytes"), [((), 4), ((1,), 4), ((5,), 20), ((0,), 0), ((3, 0, 2), 0), ((2, 3, 4), 96)]
)
def test_nbytes(shape: tuple[int, ...], nbytes: int, make_tensor: MakeTensor) -> None:
    assert make_tensor(shape, DType.FLOAT32).nbytes == nbytes


@pytest.mark.parametrize(("offset", "fits"), [(0, True), (4, True), (5, False), (12, False), (-1, False)])
def test_a_tensor_never_leaves_its_memory(
    offset: int, fits: bool, make_tensor: MakeTensor, host_memory: Callable[[bytes], Any]
) -> None:
    memory = host_memory(bytes(12))
    if fits:
        assert make_tensor((2,), DType.FLOAT32, memory=memory, offset=offset).address == memory.address + offset
    else:
        with pytest.raises(RangeError) as caught:
            make_tensor((2,), DType.FLOAT32, memory=memory, offset=offset)
        assert (caught.value.offset, caught.value.nbytes, caught.value.limit) == (offset, 8, 12)


def test_repr(make_tensor: MakeTensor) -> None:
    tensor = make_tensor((3, 4), DType.BFLOAT16)
    assert repr(tensor) == ("Tensor('blk.3.attn_q.weight', shape=(3, 4), dtype=bfloat16, type=BF16, device='host')")
    tensor.close()
    assert repr(tensor).endswith("device='host', closed)")


def test_the_room_loads_nothing_heavy() -> None:
    heavy = "{'numpy', 'numba', 'gguf', 'cuda', 'torch', 'ml_dtypes'}"
    script = f"import sys, asyncload.model; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")
