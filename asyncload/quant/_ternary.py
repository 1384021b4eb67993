"""One to two bits a weight without a grid: ``d * (q - 1)``, or ``d`` and ``-d``; one float16 scale a block.

The blocks are those of ggml-common.h, the values those of dequantize_row_* in ggml-quants.c
(https://github.com/ggml-org/ggml/tree/master/src).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from asyncload.gguf import GGMLType
from asyncload.quant._block import Block, Decoder
from asyncload.quant._vector import I8, Lane, Vector

__all__ = ["DECODERS"]

_ONE, _TWO = 86, 171  # the first fractions of 256 from 1/3 on, and from 2/3 on


def _centred(d: Lane) -> Callable[[Vector], Vector]:
    """The value of a code: ``d * (q - 1)``."""
    return lambda q: (q - 1).to_float() * d


def _digits(fractions: Vector, count: int) -> list[Vector]:
    """The first digits in base three of bytes that are fractions of 256.

    A digit is what times 3 carries out of the byte.
    """
    digits: list[Vector] = []
    for _ in range(count):
        digits.append(fractions.fill(2) - (fractions < _ONE).widen(I8) - (fractions < _TWO).widen(I8))
        fractions = fractions + fractions + fractions
    return digits


def _tq1_0(block: Block) -> None:
    """48 bytes of five ternary digits each, 4 bytes of four, d.

    Digit n of 32 bytes, then of the 16 after them, then of the last 4, is that of as many weights.
    """
    value = _centred(block.half(52))
    rows = _digits(block.load(0, 32), 5)
    short = _digits(block.load(32, 16), 5)
    first, second, third, fourth = _digits(block.load(48, 4), 4)
    short.append(first.join(second).join(third.join(fourth)))
    rows += [left.join(right) for left, right in zip(short[::2], short[1::2], strict=True)]
    for row, codes in enumerate(rows):
        block.decode(32 * row, codes, 2, value)


def _tq2_0(block: Block) -> None:
    """64 bytes of codes, d; each of 32 bytes has one of each of four rows of 32 codes, the first in its lowest bits."""
    value = _centred(block.half(64))
    for half in range(2):
        codes = block.load(32 * half, 32)
        for row in range(4):
            block.decode(128 * half + 32 * row, (codes >> (2 * row)) & 3, 2, value)


def _q1_0(block: Block) -> None:
    """``d`` where a bit is set, else ``-d``: d, 16 bytes of bits."""
    d = block.half(0).spread(16)
    for start in range(0, 128, 16):
        block.choose(start, block.flags(2 + start // 8, 16), d, d * -1)


def _q2_0(block: Block) -> None:
    """``d * (q - 1)``: d, 16 bytes of codes."""
    value = _centred(block.half(0))
    for start in (0, 32):
        block.decode(start, block.crumbs(2 + start // 4, 32), 2, value)


DECODERS: Final[Mapping[GGMLType, Decoder]] = {
    GGMLType.TQ1_0: _tq1_0,
    GGMLType.TQ2_0: _tq2_0,
    GGMLType.Q1_0: _q1_0,
    GGMLType.Q2_0: _q2_0,
}
