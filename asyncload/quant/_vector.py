"""Vectors of LLVM values, with operators, so that what is computed reads as it would in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import llvmlite.ir

__all__ = ["DOUBLE", "FLOAT", "HALF", "I1", "I8", "I16", "I32", "I64", "Lane", "Operand", "Vector", "constant", "ir"]

ir: Any = llvmlite.ir  # it carries no types

I1: Final = ir.IntType(1)
I8: Final = ir.IntType(8)
I16: Final = ir.IntType(16)
I32: Final = ir.IntType(32)
I64: Final = ir.IntType(64)
HALF: Final = ir.HalfType()
FLOAT: Final = ir.FloatType()
DOUBLE: Final = ir.DoubleType()


def constant(element: Any, values: Sequence[float]) -> Any:
    """An LLVM constant of as many lanes as there are values."""
    return ir.Constant(ir.VectorType(element, len(values)), [ir.Constant(element, value) for value in values])


@dataclass(frozen=True, slots=True)
class Lane:
    """One lane of a vector, as an operand that spreads over all lanes of the other; of ``count``, each over a share."""

    vector: Vector
    index: int
    count: int = 1

    def spread(self, lanes: int) -> Vector:
        """A vector that has this lane in each of its lanes, or consecutive ones from it on in equal runs."""
        share = lanes // self.count
        return self.vector.pick([self.index + lane // share for lane in range(lanes)])


class Vector:
    """An LLVM vector; operators act lane by lane with another vector, one lane of it, a number, or one for each.

    The lanes are integers or floats and never change by themselves: ``to_float``, ``widen`` and ``narrow`` say so.
    """

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

    def _operand(self, other: Operand) -> Any:
        if isinstance(other, Lane):
            return other.spread(self.lanes).value
        if isinstance(other, Vector):
            return other.value
        return constant(self.element, other if isinstance(other, Sequence) else [other] * self.lanes)

    def _apply(self, integers: str, floats: str, other: Operand) -> Vector:
        operation = getattr(self.builder, floats if self.element == FLOAT else integers)
        return Vector(self.builder, operation(self.value, self._operand(other)))

    def __add__(self, other: Operand) -> Vector:
        return self._apply("add", "fadd", other)

    def __sub__(self, other: Operand) -> Vector:
        return self._apply("sub", "fsub", other)

    def __mul__(self, other: Operand) -> Vector:
        return self._apply("mul", "fmul", other)

    def __and__(self, other: Operand) -> Vector:
        return self._apply("and_", "", other)

    def __or__(self, other: Operand) -> Vector:
        return self._apply("or_", "", other)

    def __xor__(self, other: Operand) -> Vector:
        return self._apply("xor", "", other)

    def __lshift__(self, other: Operand) -> Vector:
        return self._apply("shl", "", other)

    def __rshift__(self, other: Operand) -> Vector:
        return self._apply("lshr", "", other)  # vacated bits are zero

    def __lt__(self, other: Operand) -> Vector:
        return Vector(self.builder, self.builder.icmp_unsigned("<", self.value, self._operand(other)))

    def equals(self, other: Operand) -> Vector:
        """Truth values: which lanes are the same integers."""
        return Vector(self.builder, self.builder.icmp_unsigned("==", self.value, self._operand(other)))

    def bits(self) -> Vector:
        """Truth values: the bits of each byte, the lowest first."""
        masks = [1 << bit for bit in range(8)] * self.lanes
        return (self.repeat(8) & masks).equals(masks)

    def is_nan(self) -> Vector:
        """Truth values: which lanes are no number."""
        return Vector(self.builder, self.builder.fcmp_unordered("uno", self.value, self.value))

    def select(self, yes: Vector, no: Vector) -> Vector:
        """The lanes of ``yes`` where this vector of truth values is true, else those of ``no``."""
        return Vector(self.builder, self.builder.select(self.value, yes.value, no.value))

    def fill(self, value: float) -> Vector:
        """A vector like this one with the same number in each lane."""
        return Vector(self.builder, constant(self.element, [value] * self.lanes))

    def __getitem__(self, index: int | slice) -> Lane:
        if isinstance(index, slice):
            lanes = range(self.lanes)[index]
            return Lane(self, lanes[0], len(lanes))
        return Lane(self, index)

    def pick(self, indices: Sequence[int]) -> Vector:
        """The lanes at ``indices``, in their order."""
        undefined = ir.Constant(self.value.type, ir.Undefined)
        return Vector(self.builder, self.builder.shuffle_vector(self.value, undefined, constant(I32, indices)))

    def repeat(self, count: int) -> Vector:
        """Each lane ``count`` times."""
        return self[:].spread(count * self.lanes)

    def part(self, start: int, lanes: int) -> Vector:
        """``lanes`` consecutive lanes."""
        return self if lanes == self.lanes else self.pick(range(start, start + lanes))

    def join(self, other: Vector) -> Vector:
        """The lanes of this vector, then those of another of the same size."""
        indices = constant(I32, range(2 * self.lanes))
        return Vector(self.builder, self.builder.shuffle_vector(self.value, other.value, indices))

    def cast(self, element: Any) -> Vector:
        """The same bits as lanes of another type, which may change their number."""
        lanes = self.lanes * _width(self.element) // _width(element)
        return Vector(self.builder, self.builder.bitcast(self.value, ir.VectorType(element, lanes)))

    def widen(self, element: Any) -> Vector:
        """Each lane as an unsigned integer of a wider type."""
        return Vector(self.builder, self.builder.zext(self.value, ir.VectorType(element, self.lanes)))

    def narrow(self, element: Any) -> Vector:
        """The low bits of each lane."""
        return Vector(self.builder, self.builder.trunc(self.value, ir.VectorType(element, self.lanes)))

    def to_float(self) -> Vector:
        """Each lane, a signed integer or a float64, as a float32; what does not fit is rounded to the nearest."""
        if self.element == DOUBLE:
            return Vector(self.builder, self.builder.fptrunc(self.value, ir.VectorType(FLOAT, self.lanes)))
        wide = self.builder.sext(self.value, ir.VectorType(I32, self.lanes))
        return Vector(self.builder, self.builder.sitofp(wide, ir.VectorType(FLOAT, self.lanes)))


Operand = Vector | Lane | Sequence[int] | float


def _width(element: Any) -> int:
    """The bits of a lane."""
    return int(element.width) if isinstance(element, ir.IntType) else 16 if element == HALF else 32
