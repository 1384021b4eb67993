"""The first quantized types: 32 weights a block, one scale ``d``, and in some a minimum ``m``, in float16.

The blocks are those of ggml-common.h, the values those of dequantize_row_* in ggml-quants.c
(https://github.com/ggml-org/ggml/tree/master/src).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from asyncload.gguf import GGMLType
from asyncload.quant._block import Block, Decoder
from asyncload.quant._vector import Vector

__all__ = ["DECODERS"]


def _codes(block: Block, offset: int) -> Vector:
    """32 codes of 4 bits: the first 16 in the low halves of 16 bytes, the others in the high ones."""
    low, high = block.nibbles(offset, 16)
    return low.join(high)


def _q4_0(block: Block) -> None:
    """``d * (q - 8)``: d, 16 bytes of codes."""
    d = block.half(0)
    block.decode(0, _codes(block, 2), 4, lambda q: (q - 8).to_float() * d)


def _q4_1(block: Block) -> None:
    """``d * q + m``: d, m, 16 bytes of codes."""
    d, m = block.half(0), block.half(2)
    block.decode(0, _codes(block, 4), 4, lambda q: q.to_float() * d + m)


def _q5_0(block: Block) -> None:
    """``d * (q - 16)``: d, the fifth bits of all codes, 16 bytes of codes."""
    d, q = block.half(0), _codes(block, 6) | (block.bits(2, 32) << 4)
    block.decode(0, q, 5, lambda q: (q - 16).to_float() * d)


def _q5_1(block: Block) -> None:
    """``d * q + m``: d, m, the fifth bits of all codes, 16 bytes of codes."""
    d, m, q = block.half(0), block.half(2), _codes(block, 8) | (block.bits(4, 32) << 4)
    block.decode(0, q, 5, lambda q: q.to_float() * d + m)


def _q8_0(block: Block) -> None:
    """``d * q``: d, 32 signed bytes."""
    block.store(0, block.load(2, 32).to_float() * block.half(0))


DECODERS: Final[Mapping[GGMLType, Decoder]] = {
    GGMLType.Q4_0: _q4_0,
    GGMLType.Q4_1: _q4_1,
    GGMLType.Q5_0: _q5_0,
    GGMLType.Q5_1: _q5_1,
    GGMLType.Q8_0: _q8_0,
}
