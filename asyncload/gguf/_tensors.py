"""The tensors of a header: their entries, and whether their data can lie where these say."""

from __future__ import annotations

import struct
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from math import prod
from operator import attrgetter
from typing import Final, NoReturn

from asyncload.errors import UnsupportedTypeError
from asyncload.gguf._header import TensorInfo, merge_sorted
from asyncload.gguf._reader import MAX_NAME, Missing, Reader, Steps, quote
from asyncload.gguf._types import REMOVED_TYPES, TYPES_BY_ID, GGMLType

__all__ = ["SMALLEST_ENTRY", "Entry", "place", "read_entries"]

# What one entry takes at the very least.
SMALLEST_ENTRY: Final = 8 + 1 + 4 + 4 + 8

_MAX_NAME_STRICT: Final = 63  # ggml's GGML_MAX_NAME, less the NUL
_MAX_DIMENSIONS: Final = 4
_MAX_WEIGHTS: Final = (1 << 63) - 1
_UINT32: Final = struct.Struct("<I")
# By number of dimensions: these, the type, the offset of the data.
_ENTRIES: Final = tuple(struct.Struct(f"<{n}qiQ") for n in range(_MAX_DIMENSIONS + 1))
_OFFSET: Final = 8  # bytes of an entry's last field
_TYPE_AND_OFFSET: Final = _UINT32.size + _OFFSET
_UNITS_OF_AN_ENTRY: Final = 64
_ENTRIES_AT_ONCE: Final = 32

# Its name, shape, type and offset as they stand there, and the position behind it.
RawEntry = tuple[str, tuple[int, ...], int, int, int]
# Its name, type, shape, offset from where data begins, bytes, and where the offset stands. There are many: tuples of a
# class of their own take twice the time.
Entry = tuple[str, GGMLType, tuple[int, ...], int, int, int]

_in_cpp: Callable[[bytearray, int, int, int], list[RawEntry]] | None
try:
    from asyncload_native import read_entries as _in_cpp
except ImportError:
    _in_cpp = None


def read_entries(reader: Reader, count: int, *, strict: bool) -> Steps[dict[str, Entry]]:
    """Reads ``count`` entries; with ``strict``, names no longer than ggml's."""
    entries: dict[str, Entry] = {}
    longest = _MAX_NAME_STRICT if strict else MAX_NAME
    while (before := len(entries)) < count:
        most = min(before + _ENTRIES_AT_ONCE, count)
        yield from reader.retry(_some_entries, reader, longest, entries, most)
        reader.work(_UNITS_OF_AN_ENTRY * (len(entries) - before))
    return entries


def _some_entries(begin: int, reader: Reader, longest: int, entries: dict[str, Entry], most: int) -> tuple[None, int]:
    """Adds entries until there are ``most`` or the next one is not all there; raises ``Missing`` if none is."""
    at = begin
    for raw in _in_cpp(reader.buffer, begin, most - len(entries), longest) if _in_cpp else ():
        _check_name(raw[0], at, reader, entries)
        _add(raw, reader, entries)
        at = raw[-1]
    try:
        while len(entries) < most:  # where C++ has come to something missing or wrong, or there is none
            raw = _raw_entry(at, reader, longest, entries)
            _add(raw, reader, entries)
            at = raw[-1]
    except Missing:
        if at == begin:
            raise
    return None, at


def _raw_entry(begin: int, reader: Reader, longest: int, known: Container[str]) -> RawEntry:
    name, at = reader.name_at(begin, "a tensor's name", longest)
    _check_name(name, begin, reader, known)
    n_dimensions: int
    (n_dimensions,), shape_at = reader.numbers_at(at, _UINT32, "a number of dimensions")
    if n_dimensions > _MAX_DIMENSIONS:
        raise reader.error(f"tensor {quote(name)} has {n_dimensions} dimensions, more than {_MAX_DIMENSIONS}", at)
    fields: tuple[int, ...]
    fields, end = reader.numbers_at(shape_at, _ENTRIES[n_dimensions], "a tensor's shape, type and offset")
    *dimensions, number, offset = fields
    _check_dimensions(reader, name, dimensions, shape_at)
    return name, tuple(dimensions[::-1]), number, offset, end


def _add(raw: RawEntry, reader: Reader, entries: dict[str, Entry]) -> None:
    """Adds an entry, if its rows are whole blocks of its type."""
    name, shape, number, offset, end = raw
    if (kind := TYPES_BY_ID.get(number)) is None:
        _refuse_type(reader, number, name, end - _TYPE_AND_OFFSET)
    row = shape[-1] if shape else 1
    if row % kind.block_size:
        raise reader.error(
            f"tensor {quote(name)} has rows of {row} weights, no multiple of {kind.name}'s {kind.block_size}",
            end - _TYPE_AND_OFFSET - 8 * len(shape),
        )
    nbytes = prod(shape) // kind.block_size * kind.type_size
    entries[name] = name, kind, shape, offset, nbytes, end - _OFFSET


def _check_name(name: str, at: int, reader: Reader, known: Container[str]) -> None:
    if name in known:
        raise reader.error(f"tensor {quote(name)} is there twice", at)


def _check_dimensions(reader: Reader, name: str, dimensions: Sequence[int], at: int) -> None:
    span = 1  # the number of weights as if no dimension were zero: strides must be countable then, too
    for index, dimension in enumerate(dimensions):
        if dimension < 0:
            raise reader.error(f"tensor {quote(name)} has a negative dimension ({dimension})", at + 8 * index)
        span *= max(dimension, 1)
        if span > _MAX_WEIGHTS:
            raise reader.error(f"tensor {quote(name)} has more weights than can be counted", at + 8 * index)


def _refuse_type(reader: Reader, number: int, name: str, at: int) -> NoReturn:
    if (removed := REMOVED_TYPES.get(number)) is not None:
        what = f"type {removed} (id {number}), which ggml has removed"
    elif number > max(TYPES_BY_ID):
        what = f"type id {number}, which ggml does not have: a fork of it wrote this file"
    else:
        what = f"type id {number}, which does not exist"
    raise UnsupportedTypeError(f"tensor {quote(name)} is of {what}", offset=at, type_id=number, url=reader.url)


def place(
    entries: Mapping[str, Entry], reader: Reader, *, data_offset: int, alignment: int, strict: bool
) -> tuple[dict[str, TensorInfo], int]:
    """Gives each tensor its place in the file, in the order of the entries; also returns the bytes of all.

    Raises ``FormatError`` for data that is misaligned or overlaps, or (``strict``) does not lie in order with nothing
    but padding between; ``TruncatedError`` for data that is not all there, with ``strict`` the last padding included.
    """
    tensors: dict[str, TensorInfo] = {}
    in_order, total, end = True, 0, data_offset
    for name, kind, shape, offset, nbytes, at in entries.values():
        start = data_offset + offset
        if offset % alignment:
            raise reader.error(f"the data of tensor {quote(name)} begins at {offset}, no multiple of {alignment}", at)
        if strict and start != end:
            expected = end - data_offset
            raise reader.error(f"the data of tensor {quote(name)} begins at {offset}, not next at {expected}", at)
        padding = -nbytes % alignment if strict else 0
        if start + nbytes + padding > reader.size:
            raise reader.truncated(f"the data of tensor {quote(name)} reaches past the end of the file", at)
        if nbytes:
            total += nbytes
            in_order = in_order and start >= end
            end = start + nbytes + padding
        tensors[name] = TensorInfo(name, kind, shape, start, nbytes)
        reader.work(_UNITS_OF_AN_ENTRY)
    if not in_order:
        _refuse_overlap(tensors.values(), reader)
    return tensors, total


def _refuse_overlap(tensors: Iterable[TensorInfo], reader: Reader) -> None:
    """Raises ``FormatError`` if any two share a byte."""
    before: TensorInfo | None = None
    with_data = (tensor for tensor in tensors if tensor.nbytes)
    for tensor in merge_sorted(with_data, attrgetter("offset"), lambda: reader.work(_UNITS_OF_AN_ENTRY)):
        if before is not None and tensor.offset < before.offset + before.nbytes:
            names = f"{quote(before.name)} and {quote(tensor.name)}"
            raise reader.error(f"the data of tensors {names} overlaps", tensor.offset)
        before = tensor
