"""The metadata of a header: keys with their values, arrays left as they lie."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

from asyncload.gguf._array import ELEMENT_FORMATS, Array
from asyncload.gguf._header import Value
from asyncload.gguf._reader import MAX_NAME, Reader, Steps, quote
from asyncload.gguf._types import VALUE_TYPES_BY_ID, ValueType

__all__ = ["SMALLEST_PAIR", "read_metadata"]

# What one key with its value takes at the very least.
SMALLEST_PAIR: Final = 8 + 1 + 4 + 1

_ALIGNMENT_KEY: Final = "general.alignment"
_DEFAULT_ALIGNMENT: Final = 32
_INT32: Final = struct.Struct("<i")
_COUNT: Final = struct.Struct("<Q")
_BYTE: Final = struct.Struct("<B")
_NUMBERS: Final = {kind: struct.Struct(f"<{letter}") for kind, letter in ELEMENT_FORMATS.items()}
_UNITS_OF_A_PAIR: Final = 48


def read_metadata(reader: Reader, count: int) -> Steps[tuple[dict[str, Value], int]]:
    """Reads ``count`` keys with their values, and the alignment that they set."""
    metadata: dict[str, Value] = {}
    alignment = _DEFAULT_ALIGNMENT
    for _ in range(count):
        key = yield from _key(reader, metadata)
        at = reader.position
        kind = yield from _value_type(reader)
        metadata[key] = value = yield from _value(reader, kind)
        if key == _ALIGNMENT_KEY:
            if kind is not ValueType.UINT32 or not isinstance(value, int):
                raise reader.error(f"{_ALIGNMENT_KEY} is a {kind.name}, not a UINT32", at)
            if value.bit_count() != 1:
                raise reader.error(f"{_ALIGNMENT_KEY} is {value}, no power of two", at)
            alignment = value
        reader.work(_UNITS_OF_A_PAIR)
    return metadata, alignment


def _key(reader: Reader, known: Mapping[str, Value]) -> Steps[str]:
    at = reader.position
    key = yield from reader.name("a metadata key", MAX_NAME)
    if key in known:
        raise reader.error(f"the metadata key {quote(key)} is there twice", at)
    return key


def _value_type(reader: Reader) -> Steps[ValueType]:
    at = reader.position
    (number,) = yield from reader.take(_INT32, "a value's type")
    if (kind := VALUE_TYPES_BY_ID.get(number)) is None:
        raise reader.error(f"there is no type {number} of metadata values", at)
    return kind


def _value(reader: Reader, kind: ValueType) -> Steps[Value]:
    if kind is ValueType.ARRAY:
        return (yield from _array(reader))
    if kind is ValueType.STRING:
        return (yield from reader.string("a metadata string"))
    at = reader.position
    if kind is ValueType.BOOL:
        (byte,) = yield from reader.take(_BYTE, "a bool")
        reader.check_bools(at, 1)
        return bool(byte)
    number: tuple[int | float] = yield from reader.take(_NUMBERS[kind], "a number")
    return number[0]


def _array(reader: Reader) -> Steps[Array]:
    at = reader.position
    kind = yield from _value_type(reader)
    if kind is ValueType.ARRAY:
        raise reader.error("an array of arrays", at)
    at = reader.position
    (count,) = yield from reader.take(_COUNT, "an array's length")
    start = reader.position
    if kind is ValueType.STRING:
        marks = yield from reader.skip_strings(count, at)
        return Array(kind, count, reader.buffer, (start, reader.position), marks=marks, url=reader.url)
    nbytes = count * _NUMBERS[kind].size
    yield from reader.need(nbytes, f"an array of {count} {kind.name}", at)
    reader.position += nbytes
    if kind is ValueType.BOOL:
        reader.check_bools(start, count)
    return Array(kind, count, reader.buffer, (start, reader.position), url=reader.url)
