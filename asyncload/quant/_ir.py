"""A small vocabulary over llvmlite's builder, in which the decoder of a block reads like its definition.

A decoder is a function of one ``Block``: it loads fields, computes with ``Vector`` values, and stores weights. What it
writes is straight-line vector code for one block, so nothing is left to an auto-vectorizer, and LLVM splits the vectors
into what the processor has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import llvmlite.ir

from asyncload.quant import DType

__all__ = ["Block", "Lane", "Target", "Vector"]

ir: Any = llvmlite.ir  # carries no types

_I1: Final = ir.IntType(1)
_I8: Final = ir.IntType(8)
_I16: Final = ir.IntType(16)
_I32: Final = ir.IntType(32)
_I64: Final = ir.IntType(64)
_HALF: Final = ir.HalfType()
_FLOAT: Final = ir.FloatType()

_CACHE_LINE: Final = 64
_PREFETCH_AHEAD: Final = 2048  # bytes; far enough for memory to answer, near enough to stay in the first-level cache
_STORE_LANES: Final = (
    16  # converted at a time: wider vectors of 16-bit results are merged from halves, at a third of the speed
)


@dataclass(frozen=True, slots=True)
class Target:
    """What the processor that is compiled for can do beyond the portable code.

    ``half``: it converts between float16 and float32 (elsewhere LLVM calls library functions that the process does not
    have). ``permute``: it looks 16 and 32 lanes up in a register (AVX-512BW).
    """

    half: bool
    permute: bool


@dataclass(frozen=True, slots=True)
class Lane:
    """One lane of a vector, as an operand that spreads over all lanes of the other."""

    vector: Vector
    index: int

    def spread(self, lanes: int) -> Vector:
        """A vector that has this lane in each of its lanes."""
        return self.vector.pick([self.index] * lanes)


type_operand = object


class Vector:
    """An LLVM vector; operators act lane by lane, on the lanes of another vector, on one lane of it, or on a constant."""

    __slots__ = ("builder", "value")

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder = builder
        self.value = value

    @property
    def lanes(self) -> int:
        """How many lanes it has."""
        return int(self.value.type.count)

    @property
    def element(self) -> Any:
        """The LLVM type of a lane."""
        return self.value.type.element
