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
from asyncload.quant._vector import FLOAT, I8, I32, I64, Vector

__all__ = ["DECODERS"]

_FIRST_NORMAL: Final = 2  # the exponent whose half is no subnormal float32
_SMALLEST_NORMAL: Final = 8  # the first code of a scale with three bits of mantissa that is no subnormal
_NAN: Final = 0x7F


def _half_e8m0(bits: Vector) -> Vector:
    """Half of the powers of two with these exponents, biased by 127; the two smallest are subnormal."""
    exponents = bits.widen(I32)
    return (exponents < _FIRST_NORMAL).select((exponents + 1) << 21, (exponents - 1) << 23).cast(FLOAT)


def _half_ue4m3(bits: Vector) -> Vector:
    """Half of floats with four bits of exponent, biased by 7, and three of mantissa; the sign is ignored.

    The byte of NaN without a sign counts as zero.
    """
    codes = bits.widen(I32)
    magnitudes = codes & 0x7F
    normal = ((magnitudes << 20) + ((127 - 8) << 23)).cast(FLOAT)
    subnormal = magnitudes.to_float() * 2.0**-10
    finite = (magnitudes < _SMALLEST_NORMAL).select(subnormal, normal)
    return codes.equals(_NAN).select(finite.fill(0.0), finite)


def _mxfp4(block: Block) -> None:
    """A scale that is a power of two, 16 bytes of codes, the low halves first."""
    d = _half_e8m0(block.load(0, 4))
    low, high = block.nibbles(1, 16)
    block.decode(0, low.join(high), 4, block.scaled(values("MXFP4"), d[0]))


def _nvfp4(block: Block) -> None:
    """Four groups of 16: their scales, then 8 bytes of codes for each, the low halves first."""
    d = _half_ue4m3(block.load(0, 4))
    for group in (0, 2):
        low, high = block.nibbles(4 + 8 * group, 16)
        codes = low.join(high).cast(I64).pick([0, 2, 1, 3]).cast(I8)
        block.decode(16 * group, codes, 4, block.scaled(values("NVFP4"), d[group : group + 2]), runs=2)


DECODERS: Final[Mapping[GGMLType, Decoder]] = {GGMLType.MXFP4: _mxfp4, GGMLType.NVFP4: _nvfp4}
