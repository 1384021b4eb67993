"""Between float32 and the 16-bit formats, on vectors: to the nearest, ties to even, with subnormals, and NaN stays NaN.

IEEE 754-2019, section 4.3.1. bfloat16 is always made by integers: the processors' own instruction takes subnormals for
zeros. float16 is made by the processor where it can.
"""

from __future__ import annotations

from typing import Final

from asyncload.quant._vector import FLOAT, HALF, I16, I32, Vector, ir

__all__ = ["float_to_bfloat16", "float_to_half", "half_to_float"]

_FLOAT_INFINITY: Final = 0x7F80_0000
_FLOAT_QUIET_BIT: Final = 0x0040_0000
_HALF_INFINITY: Final = 0x7C00
_HALF_NAN: Final = 0x7E00
_MANTISSA_SHIFT: Final = 23 - 10  # float32 has 23 bits of mantissa, float16 has 10
_BIAS: Final = 127 - 15  # the difference of the exponents' biases
_HALF_SMALLEST_NORMAL: Final = (127 - 14) << 23  # as the bits of a float32
_HALF_BEYOND: Final = (127 + 16) << 23  # from here on everything is infinity


def float_to_bfloat16(values: Vector) -> Vector:
    """Rounds float32 lanes to bfloat16, as 16-bit integers."""
    bits = values.cast(I32)
    rounded = bits + ((bits >> 16) & 1) + 0x7FFF
    # rounding up would carry a NaN with a full mantissa into zero, and one with few bits into infinity
    return (values.is_nan().select(bits | _FLOAT_QUIET_BIT, rounded) >> 16).narrow(I16)


def half_to_float(halves: Vector, *, native: bool) -> Vector:
    """Widens float16 lanes, which may come as 16-bit integers, to float32; exact."""
    builder = halves.builder
    if native:
        value = builder.fpext(halves.cast(HALF).value, ir.VectorType(FLOAT, halves.lanes))
        return Vector(builder, value)
    bits = halves.cast(I16).widen(I32)
    shifted = (bits & 0x7FFF) << _MANTISSA_SHIFT
    # the multiplication moves the exponent, and makes a subnormal normal; infinity and NaN keep the highest exponent
    finite = (shifted.cast(FLOAT) * 2.0**_BIAS).cast(I32)
    magnitude = (shifted < (_HALF_INFINITY << _MANTISSA_SHIFT)).select(finite, shifted | _FLOAT_INFINITY)
    return (magnitude | ((bits & 0x8000) << 16)).cast(FLOAT)


def float_to_half(values: Vector, *, native: bool) -> Vector:
    """Rounds float32 lanes to float16, as 16-bit integers."""
    builder = values.builder
    if native:
        return Vector(builder, builder.fptrunc(values.value, ir.VectorType(HALF, values.lanes))).cast(I16)
    bits = values.cast(I32)
    magnitude = bits & 0x7FFF_FFFF
    # the sum with 0.5 has the subnormal's unit as its last place, so the addition itself rounds
    subnormal = (magnitude.cast(FLOAT) + 0.5).cast(I32) & 0x7FFF
    normal = (magnitude + ((magnitude >> _MANTISSA_SHIFT) & 1) + 0xFFF - (_BIAS << 23)) >> _MANTISSA_SHIFT
    finite = (magnitude < _HALF_SMALLEST_NORMAL).select(subnormal, normal)
    special = values.is_nan().select(magnitude.fill(_HALF_NAN), magnitude.fill(_HALF_INFINITY))
    rounded = (magnitude < _HALF_BEYOND).select(finite, special)
    return (rounded | ((bits >> 16) & 0x8000)).narrow(I16)
