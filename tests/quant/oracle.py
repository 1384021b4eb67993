"""What every test of decoding shares: blocks of each type, what ggml makes of them, and how many weights differ.

Where ggml's C is not installed, gguf-py stands in for it; what only ggml knows is then skipped, and pytest says so.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from asyncload.gguf import GGMLType
from asyncload.quant import DType
from asyncload.testing import random_blocks
from asyncload.testing._blocks import _HALVES
from bench import _ggml

__all__ = ["STORED", "blocks", "by_ggml", "by_gguf", "mistakes", "parameters"]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

# What files hold weights as: everything but the types of activations, and integers, which stay what they are.
STORED = [type_ for type_ in GGMLType if not type_.integer and type_ not in (GGMLType.Q8_1, GGMLType.Q8_K)]
# As float16: zeros, subnormals, the smallest and largest numbers, one, infinities, quiet and signalling NaNs.
EDGES = (0, 0x8000, 1, 0x8001, 0x3FF, 0x83FF, 0x400, 0x7BFF, 0xFBFF, 0x3C00, 0x7C00, 0xFC00, 0x7E01, 0x7C01)
ONLY_GGML = (GGMLType.Q1_0, GGMLType.Q2_0)


def parameters(pairs: Collection[tuple[GGMLType, DType]]) -> list[Any]:
    """Pairs as the parameters of a test that compares with a reference."""
    return [
        pytest.param(type_, dtype, id=f"{type_.name}-{dtype}", marks=[pytest.mark.ggml] * (type_ in ONLY_GGML))
        for type_, dtype in pairs
    ]


# --- blocks ----------------------------------------------------------------------------------------------------------


@cache
def blocks(type_: GGMLType) -> Bytes:
    """Blocks of a type, or weights where it has none, as uint8 of shape (blocks, bytes of a block).

    Random bytes, sane blocks, really quantized ones, each edge at each place of a block, all edges of one scale with
    all of another, and each byte in all places at once; every number of 16 bits, and what is between these.
    """
    random = np.random.default_rng(type_)
    noise = random.integers(0, 256, (3000, type_.type_size), dtype=np.uint8)
    parts = [noise, random_blocks(type_, 2001, seed=1)]
    if type_.quantized:
        parts += [_edge_scales(type_, noise), _edges_anywhere(type_, random)]
        if _ggml.AVAILABLE:
            parts.append(_ggml.quantize(type_, _weights(random)))
    parts.append(np.repeat(np.arange(256, dtype=np.uint8), type_.type_size).reshape(256, -1))
    if type_ in (GGMLType.F16, GGMLType.BF16):
        parts.append(np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(-1, 2))
    if type_ in (GGMLType.F32, GGMLType.F64):
        with np.errstate(all="ignore"):
            parts.append(_float_edges().astype(f"<f{type_.type_size}").view(np.uint8).reshape(-1, type_.type_size))
    if type_ is GGMLType.F64:
        parts.append(_float64_edges().view(np.uint8).reshape(-1, 8))
    return np.concatenate(parts)


def _weights(random: np.random.Generator) -> Floats:
    """Rows of usual, tiny, huge and no weights."""
    weights = random.standard_normal((8, 1024)).astype(np.float32)
    weights[1] *= 1e-6
    weights[2] *= 1e4
    weights[3] = 0
    return weights


def _edges_anywhere(type_: GGMLType, random: np.random.Generator) -> Bytes:
    some = random.integers(0, 256, (type_.type_size - 1, len(EDGES), type_.type_size), dtype=np.uint8)
    for at in range(type_.type_size - 1):
        some[at, :, at : at + 2] = np.array(EDGES, np.uint16).view(np.uint8).reshape(-1, 2)
    return some.reshape(-1, type_.type_size)


def _edge_scales(type_: GGMLType, noise: Bytes) -> Bytes:
    """Every pairing of edges in the float16 fields, with extreme codes and random ones."""
    fields = _HALVES.get(type_, ())
    if not fields:  # its scales are bytes, or scattered
        return noise[:0]
    codes = np.stack([*(np.full(type_.type_size, fill, np.uint8) for fill in (0, 0xFF, 0x0F, 0xF0)), *noise[:4]])
    values = np.array(np.meshgrid(*[EDGES] * len(fields)), np.uint16).reshape(len(fields), -1).T
    edges = np.repeat(codes, len(values), axis=0)
    for index, offset in enumerate(fields):
        edges[:, offset : offset + 2] = np.tile(values[:, index : index + 1].view(np.uint8), (len(codes), 1))
    return edges


def _float_edges() -> Floats:
    """Every float16 and bfloat16, the middle between each and the next, and the float32 numbers beside these."""
    halves = np.arange(1 << 16, dtype=np.uint16)
    with np.errstate(all="ignore"):
        exact = np.concatenate(
            [halves.view(np.float16).astype(np.float32).view(np.uint32), halves.astype(np.uint32) << 16]
        )
    middles = np.concatenate([exact, exact + np.uint32(1 << 12), exact + np.uint32(1 << 15)])
    return np.concatenate([middles - np.uint32(1), middles, middles + np.uint32(1)]).view(np.float32)


def _float64_edges() -> npt.NDArray[np.float64]:
    """The middles between float32 numbers and their neighbours, subnormal float32 numbers, and what is too large."""
    with np.errstate(all="ignore"):
        exact = _float_edges()[:: 1 << 4].astype(np.float64)
        middles = (exact.view(np.uint64) | np.uint64(1 << 28)).view(np.float64)
        beside = [np.nextafter(middles, side) for side in (-np.inf, np.inf)]
        small = np.linspace(2.0**-151, 2.0**-147, 1001)
        return np.concatenate([middles, *beside, small, -small, [3.4028235677973366e38, 1e39, -1e308, 5e-324]])


# --- what they are decoded to ----------------------------------------------------------------------------------------


def by_ggml(type_: GGMLType, some: Bytes) -> Floats:
    """What ggml's own C makes of the blocks of a quantized type."""
    some = np.ascontiguousarray(some)
    values = np.empty(len(some) * type_.block_size, np.float32)
    _ggml.decoder(type_)(some.ctypes.data, values.ctypes.data, values.size)
    return values


def by_gguf(type_: GGMLType, some: Bytes) -> Floats:
    """What gguf-py makes of blocks; ``NotImplementedError`` or ``ValueError`` where it does not know the type."""
    with np.errstate(all="ignore"):
        if type_ is GGMLType.F64:
            return some.reshape(-1).view(np.float64).astype(np.float32)
        rows = some if type_.quantized else some.reshape(-1)
        values: Floats = gguf.dequantize(rows, gguf.GGMLQuantizationType(int(type_)))
        return values.reshape(-1)


@cache
def _reference(type_: GGMLType) -> Floats:
    """The float32 weights of ``blocks``."""
    decode = by_ggml if type_.quantized and _ggml.AVAILABLE else by_gguf
    return decode(type_, blocks(type_))


def mistakes(type_: GGMLType, dtype: DType, got: Bytes) -> int:
    """How many elements of the first decoded blocks differ in any bit from the reference, NaNs being the same."""
    expected = _rounded(_reference(type_)[: got.size // dtype.itemsize], dtype)
    found = got.view(expected.dtype)
    return int(np.where(_is_nan(expected, dtype), ~_is_nan(found, dtype), found != expected).sum())


def _rounded(values: Floats, dtype: DType) -> npt.NDArray[Any]:
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


def _is_nan(bits: npt.NDArray[Any], dtype: DType) -> npt.NDArray[np.bool_]:
    infinity = {DType.FLOAT32: 0x7F800000, DType.FLOAT16: 0x7C00, DType.BFLOAT16: 0x7F80}[dtype]
    magnitude = bits & bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    result: npt.NDArray[np.bool_] = magnitude > infinity
    return result
