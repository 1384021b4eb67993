"""An array of metadata: an extent of the header's bytes that is decoded when someone asks for it."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Final, overload

from asyncload.errors import FormatError
from asyncload.gguf._strings import LENGTH, skip_strings
from asyncload.gguf._types import ValueType

__all__ = ["ELEMENT_FORMATS", "MARK_EVERY", "Array", "Scalar"]

Scalar = bool | int | float | str

# struct's letters for what has a fixed size; a bool is a byte that the parser has found to be 0 or 1.
ELEMENT_FORMATS: Final = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "?",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}

# Strings have no fixed size: the parser keeps the position of every 64th, and an item is found from there.
MARK_EVERY: Final = 64


class Array(Sequence[Scalar]):
    """A read-only sequence of numbers, bools or strings of one ``type``, decoded item by item or slice by slice.

    A slice gives a list, so ``array[:]`` decodes everything. Strings are checked when they are decoded: bad UTF-8
    raises ``FormatError`` then. Two arrays are equal if type and bytes are.
    """

    __slots__ = ("_buffer", "_count", "_end", "_marks", "_start", "_url", "type")

    def __init__(
        self,
        type: ValueType,  # noqa: A002 - the field's name
        count: int,
        buffer: bytearray,
        extent: tuple[int, int],
        *,
        marks: Sequence[int] = (),
        url: str | None = None,
    ) -> None:
        self.type = type
        self._count = count
        self._buffer = buffer
        self._start, self._end = extent
        self._marks = marks
        self._url = url

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Scalar: ...
    @overload
    def __getitem__(self, index: slice) -> list[Scalar]: ...
    def __getitem__(self, index: int | slice) -> Scalar | list[Scalar]:
        if isinstance(index, slice):
            wanted = range(self._count)[index]
            if not wanted:
                return []
            low = min(wanted[0], wanted[-1])
            items = self._decode(low, max(wanted[0], wanted[-1]) + 1)
            return items if wanted.step == 1 else [items[i - low] for i in wanted]
        at = range(self._count)[index]  # negative indices, and IndexError
        return self._decode(at, at + 1)[0]

    def __iter__(self) -> Iterator[Scalar]:
        for low in range(0, self._count, MARK_EVERY):
            yield from self._decode(low, min(low + MARK_EVERY, self._count))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        return (self.type, self._count) == (other.type, other._count) and self._raw() == other._raw()

    def __hash__(self) -> int:
        return hash((self.type, self._count))

    def __repr__(self) -> str:
        return f"Array({self.type.name}, {self._count} elements)"

    def _raw(self) -> memoryview:
        return memoryview(self._buffer)[self._start : self._end]

    def _decode(self, low: int, high: int) -> list[Scalar]:
        """Decodes the items from ``low`` up to ``high``."""
        if self.type is ValueType.STRING:
            return self._decode_strings(low, high)
        letter = ELEMENT_FORMATS[self.type]
        at = self._start + low * struct.calcsize(letter)
        return list(struct.unpack_from(f"<{high - low}{letter}", self._buffer, at))

    def _decode_strings(self, low: int, high: int) -> list[Scalar]:
        buffer, before = self._buffer, low % MARK_EVERY
        _, at, *_ = skip_strings(buffer, self._marks[low // MARK_EVERY], 0, before, MARK_EVERY)
        items: list[Scalar] = []
        for _ in range(low, high):
            start = at + LENGTH.size
            at = start + LENGTH.unpack_from(buffer, at)[0]
            try:
                items.append(buffer[start:at].decode())
            except UnicodeDecodeError as error:
                raise FormatError(
                    f"a string in an array of metadata is not UTF-8: {error.reason}",
                    offset=start + error.start,
                    url=self._url,
                ) from None
        return items
