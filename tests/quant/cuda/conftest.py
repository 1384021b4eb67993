"""Blocks of every type for the CUDA kernels, and what the reference decoders make of them."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from asyncload.gguf import GGMLType
from asyncload.quant import DType
from asyncload.quant.cuda import CUDA_DECODED, can_decode
from asyncload.testing import random_blocks

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

PAIRS = [(type_, dtype) for type_ in CUDA_DECODED for dtype in DType if can_decode(type_, dtype)]
# As float16: zeros, subnormals, the smallest and largest numbers, one, infinities, quiet and signalling NaNs.
EDGES = (0, 0x8000, 1, 0x8001, 0x3FF, 0x83FF, 0x400, 0x7BFF, 0xFBFF, 0x3C00, 0x7C00, 0xFC00, 0x7E01, 0x7C01)


@cache
def make_blocks(type_: GGMLType) -> Bytes:
    """Random bytes, sane blocks, each edge at each place of a block, and each byte in all places at once."""
    random = np.random.default_rng(type_)
    noise = random.integers(0, 256, (3000, type_.type_size), dtype=np.uint8)
    parts = [noise, random_blocks(type_, 2001, seed=1)]
    edges = np.array(EDGES, np.uint16).view(np.uint8).reshape(-1, 2)
    for at in range(type_.type_size - 1 if type_.quantized else 0):
        some = random.integers(0, 256, (len(edges), type_.type_size), dtype=np.uint8)
        some[:, at : at + 2] = edges
        parts.append(some)
    parts.append(np.repeat(np.arange(256, dtype=np.uint8), type_.type_size).reshape(256, -1))
    if type_ in (GGMLType.F16, GGMLType.BF16):
        parts.append(np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(-1, 2))
    if type_ in (GGMLType.F32, GGMLType.F64):
        with np.errstate(all="ignore"):
            parts.append(_float_edges().astype(f"<f{type_.type_size}").view(np.uint8).reshape(-1, type_.type_size))
    return np.concatenate(parts)


def _float_edges() -> Floats:
    """Every float16 and bfloat16, the middle between each and the next, and the float32 numbers beside these."""
    halves = np.arange(1 << 16, dtype=np.uint16)
    with np.errstate(all="ignore"):
        exact = np.concatenate(
            [halves.view(np.float16).astype(np.float32).view(np.uint32), halves.astype(np.uint32) << 16]
        )
    middles = np.concatenate([exact, exact + np.uint32(1 << 12), exact + np.uint32(1 << 15)])
    return np.concatenate([middles - np.uint32(1), middles, middles + np.uint32(1)]).view(np.float32)


def decode_by_gguf(type_: GGMLType, blocks: Bytes) -> Floats:
    """What gguf-py makes of blocks; ``NotImplementedError`` or ``ValueError`` where it does not know the type."""
    if type_ is GGMLType.F64:
        return blocks.reshape(-1).view(np.float64).astype(np.float32)
    rows = blocks if type_.quantized else blocks.reshape(-1)
    values: Floats = gguf.dequantize(rows, gguf.GGMLQuantizationType(int(type_)))
    return values.reshape(-1)


@cache
def _ggml() -> Any:
    found = find_spec("libggml")
    assert found is not None, "libggml-python is a development dependency"
    return ctypes.CDLL(str(Path(str(found.origin)).parent / "lib64" / "libggml-base.so"))


def decode_by_ggml(type_: GGMLType, blocks: Bytes) -> Floats:
    """What ggml's own C makes of the blocks of a quantized type."""
    name = f"{type_.name[:-1].lower()}K" if type_.name.endswith("_K") else type_.name.lower()
    decode = getattr(_ggml(), f"dequantize_row_{name}")
    decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    blocks = np.ascontiguousarray(blocks)
    values = np.empty(len(blocks) * type_.block_size, np.float32)
    decode(blocks.ctypes.data, values.ctypes.data, values.size)
    return values


@cache
def reference(type_: GGMLType) -> Floats:
    """The float32 weights of ``make_blocks``."""
    blocks = make_blocks(type_)
    with np.errstate(all="ignore"):
        try:
            return decode_by_gguf(type_, blocks)
        except (NotImplementedError, ValueError):
            return decode_by_ggml(type_, blocks)


def rounded(values: Floats, dtype: DType) -> npt.NDArray[Any]:
    """The bits of float32 weights as a dtype, to the nearest, ties to even."""
    with np.errstate(all="ignore"):
        match dtype:
            case DType.FLOAT32:
                return values.view(np.uint32)
            case DType.FLOAT16:
                return values.astype(np.float16).view(np.uint16)
            case _:
                bits = values.view(np.uint32)
                up = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
                return (np.where(np.isnan(values), np.uint32(0x7FC00000), up) >> np.uint32(16)).astype(np.uint16)


def is_nan(bits: npt.NDArray[Any], dtype: DType) -> npt.NDArray[np.bool_]:
    infinity = {DType.FLOAT32: 0x7F800000, DType.FLOAT16: 0x7C00, DType.BFLOAT16: 0x7F80}[dtype]
    magnitude = bits & bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    result: npt.NDArray[np.bool_] = magnitude > infinity
    return result


class Oracle:
    """The blocks of each type, and what is wrong with decoded ones."""

    blocks = staticmethod(make_blocks)
    by_gguf = staticmethod(decode_by_gguf)
    by_ggml = staticmethod(decode_by_ggml)

    @staticmethod
    def mistakes(type_: GGMLType, dtype: DType, got: Bytes) -> int:
        """How many elements of the first decoded blocks differ in any bit from the reference, NaNs being the same."""
        expected = rounded(reference(type_)[: got.size // dtype.itemsize], dtype)
        found = got.view(expected.dtype)
        return int(np.where(is_nan(expected, dtype), ~is_nan(found, dtype), found != expected).sum())


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    return Oracle()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test that asks for ``type_`` and ``dtype``, or for ``type_`` alone, once for each pair or type."""
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize(
            ("type_", "dtype"), [pytest.param(*pair, id=f"{pair[0].name}-{pair[1]}") for pair in PAIRS]
        )
    elif "type_" in metafunc.fixturenames:
        metafunc.parametrize("type_", list(CUDA_DECODED), ids=lambda type_: type_.name)
