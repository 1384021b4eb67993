"""Random blocks of every type: valid ones, whose scales are finite and of a size that real weights have.

The layouts are those of the structs in ggml's ``ggml-common.h``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from asyncload.gguf import GGMLType

__all__ = ["random_blocks"]

Bytes = NDArray[np.uint8]

# Where in a block the scales are that are 16-bit floats.
_HALVES: Final[Mapping[GGMLType, tuple[int, ...]]] = {
    GGMLType.Q4_0: (0,),
    GGMLType.Q4_1: (0, 2),
    GGMLType.Q5_0: (0,),
    GGMLType.Q5_1: (0, 2),
    GGMLType.Q8_0: (0,),
    GGMLType.Q8_1: (0,),
    GGMLType.Q2_K: (80, 82),
    GGMLType.Q3_K: (108,),
    GGMLType.Q4_K: (0, 2),
    GGMLType.Q5_K: (0, 2),
    GGMLType.Q6_K: (208,),
    GGMLType.IQ2_XXS: (0,),
    GGMLType.IQ2_XS: (0,),
    GGMLType.IQ3_XXS: (0,),
    GGMLType.IQ1_S: (0,),
    GGMLType.IQ4_NL: (0,),
    GGMLType.IQ3_S: (0,),
    GGMLType.IQ2_S: (0,),
    GGMLType.IQ4_XS: (0,),
    GGMLType.TQ1_0: (52,),
    GGMLType.TQ2_0: (64,),
    GGMLType.Q1_0: (0,),
    GGMLType.Q2_0: (0,),
}


def random_blocks(kind: GGMLType, count: int, seed: int) -> Bytes:
    """``count`` blocks (weights, where the type has no blocks), uint8 of shape (count, type_size), by ``seed``."""
    random = np.random.default_rng([seed, kind])
    if not kind.quantized:
        return _numbers(kind, count, random).view(np.uint8).reshape(count, kind.type_size)
    blocks = np.frombuffer(bytearray(random.bytes(count * kind.type_size)), np.uint8).reshape(count, kind.type_size)
    for at in _HALVES.get(kind, ()):
        blocks[:, at : at + 2] = _scales(count, random).astype("<f2").view(np.uint8).reshape(count, 2)
    if (finish := _FINISH.get(kind)) is not None:
        finish(blocks, random)
    return blocks


def _numbers(kind: GGMLType, count: int, random: np.random.Generator) -> NDArray[np.generic]:
    if kind.integer:
        dtype = np.dtype(f"<i{kind.type_size}")
        limits = np.iinfo(dtype)
        return random.integers(limits.min, limits.max, count, dtype.type, endpoint=True).astype(dtype)
    weights = random.standard_normal(count, np.float32) * np.float32(0.02)
    if kind is GGMLType.BF16:
        return (weights.view(np.uint32) >> 16).astype("<u2")
    return weights.astype(f"<f{kind.type_size}")


def _scales(count: int, random: np.random.Generator) -> NDArray[np.float32]:
    """Of both signs, neither zero nor too small for a normal 16-bit float."""
    scales = random.uniform(2.0**-12, 2.0**-9, count).astype(np.float32)
    return np.where(random.random(count) < 0.5, -scales, scales)  # noqa: PLR2004 - evenly


def _q8_1(blocks: Bytes, _: np.random.Generator) -> None:
    """The second half is the scale times the sum of the codes."""
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2")[:, 0].astype(np.float32)
    sums = blocks[:, 4:].view(np.int8).sum(axis=1, dtype=np.float32)
    blocks[:, 2:4] = (scales * sums).astype("<f2").view(np.uint8).reshape(-1, 2)


def _q8_k(blocks: Bytes, random: np.random.Generator) -> None:
    """A 32-bit scale; after the codes, the sums of each 16 of them."""
    blocks[:, :4] = _scales(len(blocks), random).astype("<f4").view(np.uint8).reshape(-1, 4)
    codes = np.ascontiguousarray(blocks[:, 4:260]).view(np.int8).reshape(-1, 16, 16)
    blocks[:, 260:] = codes.sum(axis=2, dtype=np.int16).astype("<i2").view(np.uint8)


def _iq1_m(blocks: Bytes, random: np.random.Generator) -> None:
    """The scale's four nibbles are the upper ones of four 16-bit words at the end."""
    bits = _scales(len(blocks), random).astype("<f2").view(np.uint16)
    for word in range(4):
        upper = blocks[:, 49 + 2 * word]
        upper[:] = (upper & 0x0F) | ((bits >> (4 * word)) << 4 & 0xF0).astype(np.uint8)


def _tq1_0(blocks: Bytes, random: np.random.Generator) -> None:
    """Five ternary digits a byte, four in the last four bytes, as fractions of 256; the scale is positive."""
    digits = np.empty((len(blocks), 52), np.uint16)
    digits[:, :48] = random.integers(0, 243, (len(blocks), 48))
    digits[:, 48:] = random.integers(0, 81, (len(blocks), 4)) * 3
    blocks[:, :52] = ((digits * 256 + 242) // 243).astype(np.uint8)
    blocks[:, 53] &= 0x7F


def _tq2_0(blocks: Bytes, _: np.random.Generator) -> None:
    """Two bits a digit, of which 3 is none: it becomes 2; the scale is positive."""
    codes = blocks[:, :64]
    codes &= ~(codes >> 1 & codes & 0x55)
    blocks[:, 65] &= 0x7F


def _mxfp4(blocks: Bytes, random: np.random.Generator) -> None:
    """The scale is a power of two, its exponent biased by 127."""
    blocks[:, 0] = random.integers(116, 124, len(blocks))


def _nvfp4(blocks: Bytes, random: np.random.Generator) -> None:
    """Four scales of four bits of exponent and three of mantissa, 0x7F of which is NaN."""
    blocks[:, :4] = random.integers(0x08, 0x40, (len(blocks), 4))


_FINISH: Final[Mapping[GGMLType, Callable[[Bytes, np.random.Generator], None]]] = {
    GGMLType.Q8_1: _q8_1,
    GGMLType.Q8_K: _q8_k,
    GGMLType.IQ1_M: _iq1_m,
    GGMLType.TQ1_0: _tq1_0,
    GGMLType.TQ2_0: _tq2_0,
    GGMLType.MXFP4: _mxfp4,
    GGMLType.NVFP4: _nvfp4,
}
