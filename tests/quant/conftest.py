"""Blocks of every kind, and what the reference decoders make of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import gguf
import libgguf
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from asyncload.gguf import GGMLType
from asyncload.quant import DType

Bytes = npt.NDArray[np.uint8]

# Where the float16 fields of a block are.
SCALES: dict[GGMLType, tuple[int, ...]] = {
    GGMLType.Q4_0: (0,),
    GGMLType.Q4_1: (0, 2),
    GGMLType.Q5_0: (0,),
    GGMLType.Q5_1: (0, 2),
    GGMLType.Q8_0: (0,),
    GGMLType.Q4_K: (0, 2),
    GGMLType.Q5_K: (0, 2),
    GGMLType.Q6_K: (208,),
    GGMLType.IQ1_S: (0,),
    GGMLType.IQ2_XXS: (0,),
    GGMLType.IQ2_XS: (0,),
    GGMLType.IQ2_S: (0,),
    GGMLType.IQ3_XXS: (0,),
    GGMLType.IQ3_S: (0,),
    GGMLType.IQ4_NL: (0,),
    GGMLType.IQ4_XS: (0,),
}
# Zeros, the smallest and largest subnormals, the smallest and largest numbers, infinities, quiet and signalling NaNs.
EDGES = tuple(sign | bits for bits in (0, 1, 0x3FF, 0x400, 0x7BFF, 0x7C00, 0x7E00, 0x7C01) for sign in (0, 0x8000))


@cache
def make_blocks(type_: GGMLType) -> Bytes:
    """Blocks from a quantizer, blocks of random bytes, and every pairing of edge scales with extreme codes."""
    random = np.random.default_rng(type_)
    noise = random.integers(0, 256, (2000, type_.type_size), dtype=np.uint8)
    if type_ is GGMLType.F32:
        return np.concatenate([noise.reshape(-1), _float32_edges()])
    if not type_.quantized:
        return np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    weights = random.standard_normal((16, 1024)).astype(np.float32)
    weights[1] *= 1e-6
    weights[2] *= 1e4
    weights[3] = 0
    real: Bytes = libgguf.quantize_rows(weights, int(type_)).reshape(-1, type_.type_size)
    codes = [np.full(type_.type_size, fill, np.uint8) for fill in (0, 0xFF, 0x0F, 0xF0)]
    edges = np.stack([*codes, *noise[:4]])
    fields = SCALES.get(type_)
    if fields is None:  # its scales are of 8 bits or in pieces, and the random bytes have each there is
        return np.concatenate([real, noise, edges]).reshape(-1)
    values = np.array(np.meshgrid(*[EDGES] * len(fields)), np.uint16).reshape(len(fields), -1).T
    edges = np.repeat(edges, len(values), axis=0)
    for index, offset in enumerate(fields):
        edges[:, offset : offset + 2] = np.tile(values[:, index : index + 1].view(np.uint8), (8, 1))
    return np.concatenate([real, noise, edges]).reshape(-1)


def _float32_edges() -> Bytes:
    """Every float16 and bfloat16, the middle between each and the next, and the float32 numbers beside these."""
    halves = np.arange(1 << 16, dtype=np.uint16)
    with np.errstate(all="ignore"):
        exact = np.concatenate(
            [halves.view(np.float16).astype(np.float32).view(np.uint32), halves.astype(np.uint32) << 16]
        )
    middles = np.concatenate([exact, exact + np.uint32(1 << 12), exact + np.uint32(1 << 15)])
    return np.concatenate([middles - np.uint32(1), middles, middles + np.uint32(1)]).view(np.uint8)


@cache
def decode_by_reference(type_: GGMLType, dtype: DType) -> npt.NDArray[Any]:
    """What gguf-py makes of the blocks, rounded by numpy and ml_dtypes."""
    blocks = make_blocks(type_)
    rows = blocks.reshape(-1, type_.type_size) if type_.quantized else blocks
    with np.errstate(all="ignore"):
        values = gguf.dequantize(rows, gguf.GGMLQuantizationType(int(type_))).reshape(-1)
        return values.astype(ml_dtypes.bfloat16 if dtype is DType.BFLOAT16 else np.dtype(str(dtype)))


def count_mistakes(type_: GGMLType, dtype: DType, got: Bytes) -> int:
    """How many elements of the decoded blocks differ from the reference in any bit, all NaNs being the same."""
    wanted = decode_by_reference(type_, dtype)
    unsigned = np.dtype(f"u{wanted.itemsize}")
    with np.errstate(all="ignore"):
        nan = np.isnan(wanted.astype(np.float32))
        got_nan = np.isnan(got.view(wanted.dtype).astype(np.float32))
    return int(np.where(nan, ~got_nan, got.view(unsigned) != wanted.view(unsigned)).sum())


@pytest.fixture(scope="session")
def blocks() -> Callable[[GGMLType], Bytes]:
    return make_blocks


@pytest.fixture(scope="session")
def mistakes() -> Callable[[GGMLType, DType, Bytes], int]:
    return count_mistakes
