"""Plain floats: each weight by itself, decoded as many at a time as the block is given weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from asyncload.gguf import GGMLType
from asyncload.quant._block import Block, Decoder
from asyncload.quant._vector import DOUBLE, FLOAT, I16, I32

__all__ = ["DECODERS"]


def _f64(block: Block) -> None:
    """Rounded to float32 first, as everything is."""
    block.store(0, block.load(0, block.weights, DOUBLE).to_float())


def _f32(block: Block) -> None:
    block.store(0, block.load(0, block.weights, FLOAT))


def _f16(block: Block) -> None:
    block.store(0, block.halves(0, block.weights))


def _bf16(block: Block) -> None:
    """The upper half of a float32."""
    block.store(0, (block.load(0, block.weights, I16).widen(I32) << 16).cast(FLOAT))


DECODERS: Final[Mapping[GGMLType, Decoder]] = {
    GGMLType.F64: _f64,
    GGMLType.F32: _f32,
    GGMLType.F16: _f16,
    GGMLType.BF16: _bf16,
}
