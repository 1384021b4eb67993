from __future__ import annotations

import ctypes
from collections.abc import Callable
from importlib import import_module
from math import prod
from types import ModuleType
from typing import Any

import pytest

from asyncload.device import DeviceInfo
from asyncload.gguf import GGMLType
from asyncload.model import Memory, Tensor
from asyncload.quant import DType


class HostMemory:
    """Host memory that is plain to see: who holds it is told by its reference count and by weak references."""

    def __init__(self, content: bytes) -> None:
        self.nbytes = len(content)
        self._buffer = ctypes.create_string_buffer(content, max(len(content), 1))
        self.address = ctypes.addressof(self._buffer) if content else 0

    @property
    def content(self) -> bytes:
        return self._buffer.raw[: self.nbytes]


_TYPES = {
    DType.FLOAT64: GGMLType.F64,
    DType.FLOAT32: GGMLType.F32,
    DType.FLOAT16: GGMLType.F16,
    DType.BFLOAT16: GGMLType.BF16,
    DType.INT8: GGMLType.I8,
    DType.INT16: GGMLType.I16,
    DType.INT32: GGMLType.I32,
    DType.INT64: GGMLType.I64,
    DType.UINT8: GGMLType.Q8_0,
}


@pytest.fixture
def host() -> DeviceInfo:
    return DeviceInfo(name="host", kind="host", index=0, model="host memory", total_bytes=1 << 30)


@pytest.fixture
def cuda() -> DeviceInfo:
    """A device that need not exist: nothing in these tests reads or writes its memory."""
    return DeviceInfo(name="cuda:1", kind="cuda", index=1, model="a GPU", total_bytes=1 << 30)


@pytest.fixture
def host_memory() -> Callable[[bytes], Any]:
    return HostMemory


@pytest.fixture
def make_tensor(host: DeviceInfo) -> Callable[..., Tensor]:
    """Makes a tensor from its shape and dtype, in zeroed host memory if nothing else is said."""

    def make(
        shape: tuple[int, ...],
        dtype: DType,
        *,
        name: str = "blk.3.attn_q.weight",
        device: DeviceInfo = host,
        memory: Memory | None = None,
        offset: int = 0,
    ) -> Tensor:
        if memory is None:
            memory = HostMemory(bytes(prod(shape) * dtype.itemsize))
        return Tensor(
            name,
            shape=shape,
            logical_shape=shape,
            dtype=dtype,
            type=_TYPES[dtype],
            device=device,
            memory=memory,
            offset=offset,
        )

    return make


@pytest.fixture
def torch() -> ModuleType:
    """For tests marked ``torch``, which run only where it is installed."""
    return import_module("torch")


@pytest.fixture
def cupy() -> ModuleType:
    """For tests marked ``cupy``, which run only where it is installed."""
    return import_module("cupy")
