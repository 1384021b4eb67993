"""Codes of 4-bit floats (a sign, two bits of exponent, one of mantissa) under a scale of 8 bits.

The codes' values are doubled to make integers of them, and so the scale is halved. The blocks are those of
ggml-common.h, the values those of dequantize_row_* in ggml-quants.c
(https://github.com/ggml-org/ggml/tree/master/src).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from asyncload.gguf import GGMLType
from asyncload.quant._block import Block, Decoder
from asyncload.quant._tables import values
from asyncload.quant._vector import FLOAT, I32, Vector

__all__ = ["DECODERS"]


def _half_e8m0(bits: Vector) -> Vector:
    """Half of the powers of two with these exponents, biased by 127; the two smallest are subnormal."""
    exponents = bits.widen(I32)
    return (exponents < 2).select((exponents + 1) << 21, (exponents - 1) << 23).cast(FLOAT)


def _half_ue4m3(bits: Vector) -> Vector:
    """Half of floats with four bits of exponent, biased by 7, and three of mantissa; 0x7F, and it alone, is zero.

    A subnormal is an integer of its own unit, and so is what it and its neighbour with an exponent of one differ in.
    """
    codes = bits.widen(I32)
    magnitudes = codes & 0x7F
    normal = ((magnitudes << 20) + ((127 - 8) << 23)).cast(FLOAT)
    subnormal = magnitudes.to_float() * 2.0**-10
    finite = (magnitudes < 8).select(subnormal, normal)
    return codes.equals(0x7F).select(finite.fill(0.0), finite)


def _mxfp4(block: Block) -> None:
    """A scale that is a power of two, 16 bytes of codes, the low halves first."""
    d = _half_e8m0(block.load(0, 4))
    table = values("MXFP4")
    low, high = block.nibbles(1, 16)
    block.decode(0, low.join(high), 4, lambda q: block.look_up(table, q).to_float() * d[0])


def _nvfp4(block: Block) -> None:
    """Four groups of 16: their scales, 32 bytes of codes, the low halves of a group first."""
    d = _half_ue4m3(block.load(0, 4))
    table = values("NVFP4")
    for pair in range(2):
        low, high = block.nibbles(4 + 16 * pair, 16)
        codes = low.part(0, 8).join(high.part(0, 8)).join(low.part(8, 8).join(high.part(8, 8)))
        scales = d[2 * pair : 2 * pair + 2]
        block.decode(32 * pair, codes, 4, lambda q, d=scales: block.look_up(table, q).to_float() * d, runs=2)


DECODERS: Final[Mapping[GGMLType, Decoder]] = {GGMLType.MXFP4: _mxfp4, GGMLType.NVFP4: _nvfp4}
