"""The IQ types: codes that point into grids of four or eight magnitudes, or to one of 16 values.

The grids and values are those of the ``gguf`` package. A kernel has a grid with codes in place of the magnitudes, so
that a code with its sign is what the values of a group are looked up by. A line is eight weights.

The blocks are those of ggml-common.h, the values those of dequantize_row_* in ggml-quants.c
(https://github.com/ggml-org/ggml/tree/master/src).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Final

from asyncload.gguf import GGMLType
from asyncload.quant import _tables
from asyncload.quant._block import Block, Decoder, Table
from asyncload.quant._vector import I8, I16, I32, Lane, Vector

__all__ = ["DECODERS"]

_LINES: Final = 32  # in a block


@cache
def _grid(name: str) -> tuple[Table, list[int]]:
    """A type's grid, and the numbers that its codes stand for."""
    entries = _tables.grid(name)
    numbers = sorted({number for entry in entries for number in entry})
    return Table(name, [bytes(map(numbers.index, entry)) for entry in entries]), numbers


def _signed(magnitudes: list[int], n_bits: int) -> list[int]:
    """Sixteen bytes that codes of ``n_bits`` bits stand for, with the sign above them."""
    positive = magnitudes + [0] * ((1 << n_bits) - len(magnitudes))
    once = positive + [-number for number in positive]
    return once * (16 // len(once))


def _even(signs: Vector) -> Vector:
    """Seven signs to a byte, with the eighth that makes the number of minus signs even."""
    odd = signs ^ (signs >> 4)
    odd ^= odd >> 2
    odd ^= odd >> 1
    return signs | (odd << 7)


def _nibbles(codes: Vector) -> Vector:
    """The low half of each byte, then its high half."""
    return (codes.repeat(2) >> [0, 4] * codes.lanes) & 0xF


def _decode_signed(block: Block, name: str, indices: Vector, signs: Vector, d: Vector) -> None:
    """``d`` times a magnitude from the grid, with a sign for each weight and as many scales as there are groups."""
    table, magnitudes = _grid(name)
    n_bits = (len(magnitudes) - 1).bit_length()
    values = _signed(magnitudes, n_bits)
    n_indices, runs = indices.lanes // 8, d.lanes // 8
    for part in range(8):
        codes = block.entries(table, indices.part(n_indices * part, n_indices))
        codes |= signs.part(4 * part, 4).bits().widen(I8) << n_bits
        scales = d[runs * part : runs * (part + 1)]
        block.decode(32 * part, codes, n_bits + 1, block.scaled(values, scales), runs=runs)


def _iq2_xxs(block: Block) -> None:
    """``d``; for each group of 32 four indices of 8 bits, then four times seven signs and a scale of 4 bits."""
    words = block.load(2, 16, I32)
    indices = words.pick(range(0, 16, 2)).cast(I8)
    packed = words.pick(range(1, 16, 2))
    signs = ((packed.repeat(4) >> [0, 7, 14, 21] * 8) & 127).narrow(I8)
    d = ((packed >> 28).to_float() + 0.5) * block.half(0) * 0.25
    _decode_signed(block, "IQ2_XXS", indices, _even(signs), d)


def _iq2_xs(block: Block) -> None:
    """``d``; for each line 9 bits of index and seven signs; a scale of 4 bits for each two lines."""
    lines = block.load(2, _LINES, I16)
    d = (_nibbles(block.load(66, 8)).to_float() + 0.5) * block.half(0) * 0.25
    _decode_signed(block, "IQ2_XS", lines & 511, _even((lines >> 9).narrow(I8)), d)


def _iq2_s(block: Block) -> None:
    """``d``; for each line 8 bits of index; eight signs; in a byte four lines' next two bits; scales as IQ2_XS."""
    upper = (block.load(66, 8).widen(I16).repeat(4) << [8, 6, 4, 2] * 8) & 0x300
    indices = block.load(2, _LINES).widen(I16) | upper
    d = (_nibbles(block.load(74, 8)).to_float() + 0.5) * block.half(0) * 0.25
    _decode_signed(block, "IQ2_S", indices, block.load(34, _LINES), d)


def _iq3_xxs(block: Block) -> None:
    """``d``; two indices for each line; for each group of 32 four times seven signs and a scale of 4 bits."""
    packed = block.load(66, 8, I32)
    signs = ((packed.repeat(4) >> [0, 7, 14, 21] * 8) & 127).narrow(I8)
    d = ((packed >> 28).to_float() + 0.5) * block.half(0) * 0.5
    _decode_signed(block, "IQ3_XXS", block.load(2, 2 * _LINES), _even(signs), d)


def _iq3_s(block: Block) -> None:
    """``d``; two indices for each line; in a byte eight of their ninth bits; signs; a scale for each group of 32."""
    ninth = block.bits(66, 2 * _LINES).widen(I16) << 8
    indices = block.load(2, 2 * _LINES).widen(I16) | ninth
    d = ((_nibbles(block.load(106, 4)) << 1) | 1).to_float() * block.half(0)
    _decode_signed(block, "IQ3_S", indices, block.load(74, _LINES), d)


def _eighths(down: Vector) -> Vector:
    """An eighth, or minus an eighth where a lane is one and not zero."""
    return (down.to_float() * -2.0 + 1.0) * 0.125


def _moved(offset: Lane, d: Lane) -> Callable[[Vector], Vector]:
    """The value of a code: ``d * (q + offset)``."""
    return lambda q: (q.to_float() + offset) * d


def _decode_ternary(block: Block, indices: Vector, delta: Vector, d: Vector) -> None:
    """``d * (q + delta)`` for -1, 0 and 1 from the grid, with as many scales, and deltas, as there are groups."""
    table, (least, _, _) = _grid("IQ1_S")
    offset = delta + least
    n_scales, runs = d.lanes // 8, delta.lanes // 8
    for part in range(8):
        codes = block.entries(table, indices.part(4 * part, 4))
        value = _moved(offset[runs * part : runs * (part + 1)], d[n_scales * part : n_scales * (part + 1)])
        block.decode(32 * part, codes, 2, value, runs=runs)


def _iq1_s(block: Block) -> None:
    """``d``; 8 bits of index for each line; for each group of 32 four times 3 more, 3 of scale, the direction."""
    packed = block.load(34, 8, I16)
    upper = ((packed.repeat(4) >> [0, 3, 6, 9] * 8) & 7) << 8
    indices = block.load(2, _LINES).widen(I16) | upper
    d = (((packed >> 11) & 14) | 1).to_float() * block.half(0)
    _decode_ternary(block, indices, _eighths(packed >> 15), d)


def _iq1_m(block: Block) -> None:
    """8 bits of index for each line; in nibbles three more and a direction; then 16 scales of 3 bits and ``d``.

    Four 16-bit words have four of the scales each, and above them a nibble of ``d``.
    """
    upper = _nibbles(block.load(32, 16))
    indices = block.load(0, _LINES).widen(I16) | ((upper.widen(I16) & 7) << 8)
    words = block.load(48, 4, I16)
    nibbles = (words >> 12) << [0, 4, 8, 12]
    d = block.to_float(nibbles | nibbles[1] | nibbles[2] | nibbles[3])
    scales = (((words.repeat(4) >> [0, 3, 6, 9] * 4) & 7) << 1) | 1
    _decode_ternary(block, indices, _eighths(upper >> 3), scales.to_float() * d[0])


def _iq4_nl(block: Block) -> None:
    """``d`` times one of 16 values: d, 16 bytes of codes, the low halves first."""
    d, values = block.half(0), _tables.values("IQ4_NL")
    low, high = block.nibbles(2, 16)
    block.decode(0, low.join(high), 4, block.scaled(values, d))


def _iq4_xs(block: Block) -> None:
    """As IQ4_NL in groups of 32: d, two high bits of each group's scale, four low bits of each, 128 bytes of codes."""
    upper = (block.load(2, 1, I16).repeat(8) >> range(0, 16, 2)).narrow(I8)
    scales = _nibbles(block.load(4, 4)) | ((upper & 3) << 4)
    d, values = (scales - 32).to_float() * block.half(0), _tables.values("IQ4_NL")
    for group in range(8):
        low, high = block.nibbles(8 + 16 * group, 16)
        block.decode(32 * group, low.join(high), 4, block.scaled(values, d[group]))


DECODERS: Final[Mapping[GGMLType, Decoder]] = {
    GGMLType.IQ1_S: _iq1_s,
    GGMLType.IQ1_M: _iq1_m,
    GGMLType.IQ2_XXS: _iq2_xxs,
    GGMLType.IQ2_XS: _iq2_xs,
    GGMLType.IQ2_S: _iq2_s,
    GGMLType.IQ3_XXS: _iq3_xxs,
    GGMLType.IQ3_S: _iq3_s,
    GGMLType.IQ4_NL: _iq4_nl,
    GGMLType.IQ4_XS: _iq4_xs,
}
