"""The types of tensors and of metadata values, by the numbers that files hold.

Numbers and names are those of the ``gguf`` package (which would bring numpy along); a test holds both tables against
it and against ggml. Where they differ, ggml is right.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import Final, Self

__all__ = ["REMOVED_TYPES", "TYPES_BY_ID", "VALUE_TYPES_BY_ID", "GGMLType", "ValueType"]


class GGMLType(IntEnum):
    """How the weights of a tensor are stored: a block of ``block_size`` weights in ``type_size`` bytes.

    Q8_1 and Q8_K are what ggml turns activations into; a file may hold them all the same.
    """

    block_size: int
    type_size: int

    def __new__(cls, number: int, block_size: int = 0, type_size: int = 0) -> Self:
        """A member with ggml's number, weights a block, and bytes a block (which ``GGMLType(8)`` need not know)."""
        member = int.__new__(cls, number)
        member._value_ = number
        member.block_size = block_size
        member.type_size = type_size
        return member

    F32 = 0, 1, 4
    F16 = 1, 1, 2
    Q4_0 = 2, 32, 18
    Q4_1 = 3, 32, 20
    Q5_0 = 6, 32, 22
    Q5_1 = 7, 32, 24
    Q8_0 = 8, 32, 34
    Q8_1 = 9, 32, 36
    Q2_K = 10, 256, 84
    Q3_K = 11, 256, 110
    Q4_K = 12, 256, 144
    Q5_K = 13, 256, 176
    Q6_K = 14, 256, 210
    Q8_K = 15, 256, 292
    IQ2_XXS = 16, 256, 66
    IQ2_XS = 17, 256, 74
    IQ3_XXS = 18, 256, 98
    IQ1_S = 19, 256, 50
    IQ4_NL = 20, 32, 18
    IQ3_S = 21, 256, 110
    IQ2_S = 22, 256, 82
    IQ4_XS = 23, 256, 136
    I8 = 24, 1, 1
    I16 = 25, 1, 2
    I32 = 26, 1, 4
    I64 = 27, 1, 8
    F64 = 28, 1, 8
    IQ1_M = 29, 256, 56
    BF16 = 30, 1, 2
    TQ1_0 = 34, 256, 54
    TQ2_0 = 35, 256, 66
    MXFP4 = 39, 32, 17
    NVFP4 = 40, 64, 36
    Q1_0 = 41, 128, 18
    Q2_0 = 42, 64, 18

    @property
    def quantized(self) -> bool:
        """Whether weights share a block, so that none can be read by itself."""
        return self.block_size > 1

    @property
    def integer(self) -> bool:
        """Whether the weights are plain signed integers."""
        return GGMLType.I8 <= self <= GGMLType.I64

    def nbytes(self, n_weights: int) -> int:
        """The bytes that ``n_weights`` weights take; raises ``ValueError`` where they do not fill whole blocks."""
        blocks, rest = divmod(n_weights, self.block_size)
        if rest or n_weights < 0:
            raise ValueError(f"{n_weights} weights are no whole blocks of {self.name} ({self.block_size} weights)")
        return blocks * self.type_size


class ValueType(IntEnum):
    """The type of a metadata value, or of the elements of an array of them."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


TYPES_BY_ID: Final[Mapping[int, GGMLType]] = MappingProxyType({int(member): member for member in GGMLType})
VALUE_TYPES_BY_ID: Final[Mapping[int, ValueType]] = MappingProxyType({int(member): member for member in ValueType})

# Types that ggml had once and no longer reads.
REMOVED_TYPES: Final[Mapping[int, str]] = MappingProxyType(
    {
        4: "Q4_2",
        5: "Q4_3",
        31: "Q4_0_4_4",
        32: "Q4_0_4_8",
        33: "Q4_0_8_8",
        36: "IQ4_NL_4_4",
        37: "IQ4_NL_4_8",
        38: "IQ4_NL_8_8",
    }
)
