"""The K types: 256 weights a block, in groups of 16 or 32 with integer scales, under one float16 scale for all.

The blocks are those of ggml-common.h, the values those of dequantize_row_* in ggml-quants.c
(https://github.com/ggml-org/ggml/tree/master/src).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from asyncload.gguf import GGMLType
from asyncload.quant._block import Block, Decoder
from asyncload.quant._vector import Lane, Vector

__all__ = ["DECODERS"]


def _crumbs(block: Block, offset: int) -> list[Vector]:
    """Four rows of 32 codes of two bits: each of 32 bytes has one of each row, the first in its lowest bits."""
    codes = block.load(offset, 32)
    return [(codes >> (2 * row)) & 3 for row in range(4)]


def _q2_k(block: Block) -> None:
    """``d * q - m`` in groups of 16: 16 bytes of scales (low halves) and minima, 64 of codes, the two factors."""
    scales, minima = block.nibbles(0, 16)
    d, m = scales.to_float() * block.half(80), minima.to_float() * block.half(82)

    def value(q: Vector, groups: Sequence[int]) -> Vector:
        return q.to_float() * d.pick(groups) - m.pick(groups)

    for half in range(2):
        block.decode_groups(8 * half, _crumbs(block, 16 + 32 * half), 2, value)


def _q3_k(block: Block) -> None:
    """``d * (q - 4)`` in groups of 16: 32 bytes of third bits, 64 of codes as in Q2_K, 12 of 6-bit scales, the factor.

    Bit n of the third bits' bytes belongs to row n. Of the scales' bytes the first eight have the low four bits, first
    those of eight groups, then of the others; the last four have the high two, of four groups to each two bits.
    """
    low, high = block.nibbles(96, 8)
    upper = block.load(104, 4).pick([group % 4 for group in range(16)])
    upper = (upper >> [group // 4 * 2 for group in range(16)]) & 3
    d = ((low.join(high) | (upper << 4)) - 32).to_float() * block.half(108)
    third = block.load(0, 32)

    def value(q: Vector, groups: Sequence[int]) -> Vector:
        return (q - 4).to_float() * d.pick(groups)

    for half in range(2):
        rows = enumerate(_crumbs(block, 32 + 32 * half), 4 * half)
        block.decode_groups(8 * half, [codes | (((third >> row) & 1) << 2) for row, codes in rows], 3, value)


def _scales_and_minima(block: Block) -> tuple[Vector, Vector]:
    """The eight groups' ``d`` and ``m``, as Q4_K and Q5_K have them: two float16 factors, then 12 bytes.

    Of the 6-bit scales the first four are the low bits of bytes 0 to 3; the last four have their low four bits in the
    low halves of bytes 8 to 11, and their high two above the first four's. Minima: the same in bytes 4 to 7, and the
    high halves.
    """
    first_scales, first_minima, last = block.load(4, 4), block.load(8, 4), block.load(12, 4)
    scales = (first_scales & 63).join((last & 0xF) | ((first_scales >> 2) & 0x30))
    minima = (first_minima & 63).join((last >> 4) | ((first_minima >> 2) & 0x30))
    return scales.to_float() * block.half(0), minima.to_float() * block.half(2)


def _linear(d: Lane, m: Lane) -> Callable[[Vector], Vector]:
    """The value of a code in a group: ``d * q - m``."""
    return lambda q: q.to_float() * d - m


def _q4_k(block: Block) -> None:
    """``d * q - m`` in groups of 32: 16 bytes of scales, then 128 bytes of codes, two groups to 32 bytes."""
    d, m = _scales_and_minima(block)
    for pair in range(4):
        for group, codes in enumerate(block.nibbles(16 + 32 * pair, 32), 2 * pair):
            block.decode(32 * group, codes, 4, _linear(d[group], m[group]))


def _q5_k(block: Block) -> None:
    """``d * q - m`` in groups of 32: as Q4_K, with 32 bytes before the codes whose bit n is group n's fifth bit."""
    d, m = _scales_and_minima(block)
    fifth = block.load(16, 32)
    for pair in range(4):
        for group, low in enumerate(block.nibbles(48 + 32 * pair, 32), 2 * pair):
            codes = low | (((fifth >> group) & 1) << 4)
            block.decode(32 * group, codes, 5, _linear(d[group], m[group]))


def _q6_k(block: Block) -> None:
    """``d * (q - 32)`` in groups of 16: 128 bytes of low halves, 64 of high bit pairs, 16 signed scales, the factor."""
    d = block.load(192, 16).to_float() * block.half(208)
    for half in range(2):
        low_0, high_0 = block.nibbles(64 * half, 32)
        low_1, high_1 = block.nibbles(64 * half + 32, 32)
        upper = block.load(128 + 32 * half, 32)
        for row, low in enumerate((low_0, low_1, high_0, high_1)):
            codes = low | (((upper >> (2 * row)) & 3) << 4)
            group = 8 * half + 2 * row
            block.store(16 * group, (codes - 32).to_float() * d.pick([group] * 16 + [group + 1] * 16))


DECODERS: Final[Mapping[GGMLType, Decoder]] = {
    GGMLType.Q2_K: _q2_k,
    GGMLType.Q3_K: _q3_k,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
}
