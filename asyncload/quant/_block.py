"""What the decoder of a block is written in: it loads fields, computes with vectors, and stores weights.

A decoder is a function of one ``Block``. What it writes is straight-line vector code, so nothing is left to an
auto-vectorizer, and LLVM cuts the vectors into what the processor has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from asyncload.quant import DType
from asyncload.quant._rounding import float_to_bfloat16, float_to_half, half_to_float
from asyncload.quant._vector import HALF, I1, I8, I16, I32, I64, Lane, Vector, constant, ir

__all__ = ["Block", "Decoder", "Processor", "Table"]

_CACHE_LINE: Final = 64  # bytes
_PREFETCH_AHEAD: Final = 2048  # bytes: far enough for memory to answer, near enough to stay in the first-level cache
_NEIGHBOURS: Final = 3  # float16 numbers that are loaded with one
_PIECE: Final = (
    16  # lanes converted and stored at a time; 16-bit results of 32 lanes would be merged from halves, slowly
)


@dataclass(frozen=True, slots=True)
class Processor:
    """What the processor that is compiled for can do beyond the portable code.

    ``half``: it converts between float16 and float32 (where it cannot, LLVM would call library functions that the
    process does not have). ``permute``: it looks lanes up in a register by variable index (AVX-512BW). ``look_up``: the
    LLVM intrinsic that looks bytes up in a register of sixteen (SSSE3, AArch64), if there is one.
    """

    half: bool
    permute: bool
    look_up: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Entries of four or eight bytes, which are kept beside the machine code."""

    name: str
    entries: Sequence[bytes]


class Block:
    """The bytes of one block, and the ``weights`` elements of ``dtype`` that they decode to; offsets are in bytes."""

    def __init__(
        self, builder: Any, source: Any, target: Any, *, weights: int, dtype: DType, processor: Processor
    ) -> None:
        self.weights = weights
        self._builder = builder
        self._source = source
        self._target = target
        self._dtype = dtype
        self._processor = processor

    # --- fields ------------------------------------------------------------------------------------------------------

    def load(self, offset: int, lanes: int, element: Any = I8) -> Vector:
        """``lanes`` consecutive elements, bytes unless told otherwise."""
        pointer = self._builder.gep(self._source, [ir.Constant(I64, offset)], inbounds=True)
        pointer = self._builder.bitcast(pointer, ir.VectorType(element, lanes).as_pointer())
        return Vector(self._builder, self._builder.load(pointer, align=1))

    def halves(self, offset: int, lanes: int) -> Vector:
        """``lanes`` consecutive float16 numbers, as float32."""
        return self.to_float(self.load(offset, lanes, HALF))

    def to_float(self, halves: Vector) -> Vector:
        """Float16 numbers, or their bits, as float32."""
        return half_to_float(halves, native=self._processor.half)

    def half(self, offset: int) -> Lane:
        """One float16 number, as float32.

        It is loaded with its neighbours (those before it where it ends its block, as in Q6_K): a load of one alone is
        an insertion into a register, which then waits for that register's last use, a whole block ago.
        """
        before = _NEIGHBOURS if offset >= 2 * _NEIGHBOURS else 0
        return self.halves(offset - 2 * before, _NEIGHBOURS + 1)[before]

    def nibbles(self, offset: int, count: int) -> tuple[Vector, Vector]:
        """The low and the high four bits of ``count`` bytes, as bytes."""
        codes = self.load(offset, count)
        return codes & 0xF, codes >> 4

    def bits(self, offset: int, count: int) -> Vector:
        """``count`` bits, the lowest first, as bytes of 0 or 1."""
        return self.flags(offset, count).widen(I8)

    def flags(self, offset: int, count: int) -> Vector:
        """``count`` bits, the lowest first, as truth values."""
        return self.load(offset, count // 8).cast(I1)

    def crumbs(self, offset: int, count: int) -> Vector:
        """``count`` codes of two bits, the lowest first, as bytes."""
        words = self.load(offset, count // 8, I16).pick([lane // 8 for lane in range(count)])
        return (words >> [2 * (lane % 8) for lane in range(count)]).narrow(I8) & 3

    # --- tables ------------------------------------------------------------------------------------------------------

    def scaled(self, values: Sequence[int], d: Lane) -> Callable[[Vector], Vector]:
        """The value of a code, of four bits: ``d`` times the signed byte that it has among sixteen."""
        return lambda codes: self._look_up(values, codes).to_float() * d

    def _look_up(self, values: Sequence[int], codes: Vector) -> Vector:
        if not self._processor.look_up:
            found = codes.fill(values[0])
            for code, value in enumerate(values[1:], 1):
                found = codes.equals(code).select(codes.fill(value), found)
            return found
        table = Vector(self._builder, constant(I8, values))
        parts = [
            self._call(self._processor.look_up, table, codes.part(start, _PIECE))
            for start in range(0, codes.lanes, _PIECE)
        ]
        return parts[0] if len(parts) == 1 else parts[0].join(parts[1])

    def entries(self, table: Table, indices: Vector) -> Vector:
        """The bytes of the table's entries at ``indices``, one entry after the other.

        Each is a load of its own, as these are faster than the processors' gathering ones.
        """
        start = self._table(table)
        element = start.type.pointee.element
        found = ir.Constant(ir.VectorType(element, indices.lanes), ir.Undefined)
        for lane in range(indices.lanes):
            number = ir.Constant(I32, lane)
            index = self._builder.zext(self._builder.extract_element(indices.value, number), I64)
            entry = self._builder.load(self._builder.gep(start, [ir.Constant(I64, 0), index], inbounds=True))
            found = self._builder.insert_element(found, entry, number)
        return Vector(self._builder, found).cast(I8)

    def _table(self, table: Table) -> Any:
        """The address of a constant of the module that is compiled."""
        module = self._builder.module
        name = f"asyncload.{table.name}"
        if (variable := module.globals.get(name)) is None:
            element = ir.IntType(8 * len(table.entries[0]))
            kind = ir.ArrayType(element, len(table.entries))
            words = [ir.Constant(element, int.from_bytes(entry, "little")) for entry in table.entries]
            variable = ir.GlobalVariable(module, kind, name)
            variable.linkage, variable.global_constant, variable.unnamed_addr = "private", True, True
            variable.align = _CACHE_LINE
            variable.initializer = ir.Constant(kind, words)
        return variable

    # --- weights -----------------------------------------------------------------------------------------------------

    def copy(self) -> None:
        """Stores the bytes of weights that are of the block's dtype already."""
        self._write(0, self.load(0, self.weights, ir.IntType(8 * self._dtype.itemsize)))

    def store(self, index: int, values: Vector) -> None:
        """Rounds float32 values to the block's dtype and stores them from weight ``index`` on."""
        lanes = min(_PIECE, values.lanes)
        for start in range(0, values.lanes, lanes):
            self._write(index + start, self._round(values.part(start, lanes)))

    def decode(
        self, index: int, codes: Vector, n_bits: int, value: Callable[[Vector], Vector], *, runs: int = 1
    ) -> None:
        """Stores ``value(codes)`` for 32 codes of ``n_bits`` bits, from weight ``index`` on.

        Where the processor can look them up, ``value`` is computed, and rounded, once for each code that can occur, in
        each of ``runs`` equal runs of the codes; ``value`` is always given codes in as many equal runs.
        """
        size = max(1 << n_bits, _PIECE // runs)
        if self._table_size < size * runs:
            self.store(index, value(codes))
            return
        every = value(Vector(self._builder, constant(I8, [*range(size)] * runs)))
        table = [self._round(every.part(start, _PIECE)) for start in range(0, every.lanes, _PIECE)]
        if runs > 1:
            codes |= [lane * runs // codes.lanes * size for lane in range(codes.lanes)]
        self._write_entries(index, table, codes)

    def decode_groups(
        self, group: int, rows: Sequence[Vector], n_bits: int, value: Callable[[Vector, Sequence[int]], Vector]
    ) -> None:
        """Stores ``value(codes, groups)`` for rows of 32 codes of ``n_bits`` bits, from that group of 16 weights on.

        ``groups`` has the group of each lane. Where the processor can look them up, the values of all codes of some
        groups, as many as a table holds, are computed at once.
        """
        if not self._table_size:
            for first, codes in enumerate(rows):
                self.store(16 * group + 32 * first, value(codes, _pair_of_groups(group + 2 * first)))
            return
        lanes, together = range(self._table_size), self._table_size // 2 >> n_bits  # rows that share a table
        every = Vector(self._builder, constant(I8, [lane % (1 << n_bits) for lane in lanes]))
        for start in range(0, len(rows), together):
            first = group + 2 * start
            values = value(every, [first + (lane >> n_bits) for lane in lanes])
            table = [self._round(values.part(at, _PIECE)) for at in range(0, values.lanes, _PIECE)]
            for row, codes in enumerate(rows[start : start + together]):
                offsets = [place << n_bits for place in _pair_of_groups(2 * row)]
                self._write_entries(16 * first + 32 * row, table, codes | offsets)

    def choose(self, index: int, where: Vector, yes: Vector, no: Vector) -> None:
        """Stores, from weight ``index`` on, for 16 truth values a lane of ``yes`` where true, else of ``no``.

        What is the same for the whole block is rounded once.
        """
        self._write(index, where.select(self._round(yes), self._round(no)))

    def _write_entries(self, index: int, table: list[Vector], codes: Vector) -> None:
        """Stores what a table of 16 or 32 elements, in one or two vectors, has for 32 codes."""
        if self._dtype is DType.FLOAT32:
            for start in range(0, codes.lanes, _PIECE):
                self._write(index + start, self._look_up_float(table, codes.part(start, _PIECE).widen(I32)))
        elif not self._processor.permute:
            octets = table[0].cast(I8)
            low, high = (octets.pick(range(first, octets.lanes, 2)) for first in (0, 1))
            for start in range(0, codes.lanes, _PIECE):
                part = codes.part(start, _PIECE)
                found = [self._call(self._processor.look_up, half, part) for half in (low, high)]
                turns = [lane for pair in zip(range(_PIECE), range(_PIECE, 2 * _PIECE), strict=True) for lane in pair]
                self._write(index + start, found[0].join(found[1]).pick(turns).cast(I16))
        else:
            both = table[0].join(table[-1])
            self._write(index, self._call("llvm.x86.avx512.permvar.hi.512", both, codes.widen(I16)))

    @property
    def _table_size(self) -> int:
        """How many elements the processor can look lanes up in, 0 where that is slower than to compute them."""
        if self._processor.permute:
            return 2 * _PIECE
        return _PIECE if self._processor.look_up and self._dtype is not DType.FLOAT32 else 0

    def _look_up_float(self, table: list[Vector], indices: Vector) -> Vector:
        if len(table) == 1:
            return self._call("llvm.x86.avx512.permvar.sf.512", table[0], indices)
        return self._call("llvm.x86.avx512.vpermi2var.ps.512", table[0], indices, table[1])

    def _round(self, values: Vector) -> Vector:
        """Float32 values as the bits of the block's dtype."""
        match self._dtype:
            case DType.FLOAT16:
                return float_to_half(values, native=self._processor.half)
            case DType.BFLOAT16:
                return float_to_bfloat16(values)
            case _:
                return values

    def _write(self, index: int, elements: Vector) -> None:
        """Stores elements, and has the processor fetch the cache line that will be stored to a little later.

        To own a line before it is stored to is what lets one core reach the memory's bandwidth.
        """
        size = self._dtype.itemsize
        pointer = self._builder.gep(self._target, [ir.Constant(I64, index * size)], inbounds=True)
        for offset in range(0, elements.lanes * size, _CACHE_LINE):
            if (index * size + offset) % _CACHE_LINE == 0:
                ahead = self._builder.gep(pointer, [ir.Constant(I64, _PREFETCH_AHEAD + offset)])
                write, keep, data = (ir.Constant(I32, number) for number in (1, 3, 1))
                self._function("llvm.prefetch.p0", ir.VoidType(), ahead, write, keep, data)
        pointer = self._builder.bitcast(pointer, elements.value.type.as_pointer())
        self._builder.store(elements.value, pointer, align=1)

    def _call(self, name: str, *arguments: Vector) -> Vector:
        """Calls an LLVM intrinsic that returns what its first argument is."""
        values = [argument.value for argument in arguments]
        return Vector(self._builder, self._function(name, values[0].type, *values))

    def _function(self, name: str, result: Any, *arguments: Any) -> Any:
        module = self._builder.module
        function = module.globals.get(name)
        if function is None:
            function = ir.Function(module, ir.FunctionType(result, [argument.type for argument in arguments]), name)
        return self._builder.call(function, arguments)


def _pair_of_groups(group: int) -> list[int]:
    """The group of each of 32 weights."""
    return [group] * 16 + [group + 1] * 16


Decoder = Callable[[Block], None]
