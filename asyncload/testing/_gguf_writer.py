"""A writer of GGUF files, for tests and benchmarks: layout as ggml's own, and nothing that it would refuse."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from asyncload.gguf import GGMLType, ValueType

__all__ = ["MetadataValue", "TensorSpec", "Typed", "encode_header", "lay_out", "write_gguf"]

_ELEMENT_FORMATS: Final = {
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

PlainValue = bool | int | float | str


class Typed(NamedTuple):
    """A metadata value of a type chosen by the writer; for an array, ``type`` is that of its elements."""

    type: ValueType
    value: PlainValue | Sequence[PlainValue]


MetadataValue = PlainValue | Sequence[PlainValue] | Typed


class TensorSpec(NamedTuple):
    """A tensor to be written: its row-major ``shape``, and its ``offset`` in bytes from where data begins."""

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def lay_out(
    tensors: Iterable[tuple[str, GGMLType, Sequence[int]]], alignment: int = 32
) -> tuple[list[TensorSpec], int]:
    """Places tensors one after another, each padded to ``alignment``; also returns the bytes of all data.

    Raises ``ValueError`` where a tensor's weights do not fill whole blocks.
    """
    placed: list[TensorSpec] = []
    offset = 0
    for name, kind, shape in tensors:
        n_weights = 1
        for dimension in shape:
            n_weights *= dimension
        placed.append(TensorSpec(name, kind, tuple(shape), offset, kind.nbytes(n_weights)))
        offset += placed[-1].nbytes
        offset += -offset % alignment
    return placed, offset


def encode_header(
    metadata: Mapping[str, MetadataValue], tensors: Sequence[TensorSpec], *, version: int = 3, alignment: int = 32
) -> bytes:
    """The bytes of a file before its data, padded to ``alignment``, which is written as a key if it is not 32.

    Metadata values get their natural types: UINT32 or INT32 where an integer fits, else 64 bits; FLOAT32; arrays by
    their first element, an empty one INT32. ``Typed`` chooses another.
    """
    pairs = dict(metadata)
    if alignment != 32:  # noqa: PLR2004 - the format's default
        pairs["general.alignment"] = Typed(ValueType.UINT32, alignment)
    parts = [b"GGUF", struct.pack("<IQQ", version, len(tensors), len(pairs))]
    for key, value in pairs.items():
        parts += (_string(key), _encode_value(value))
    for name, kind, shape, offset, _ in tensors:
        parts += (_string(name), struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, offset))
    header = b"".join(parts)
    return header + bytes(-len(header) % alignment)


def write_gguf(
    path: str | os.PathLike[str],
    tensors: Mapping[str, tuple[GGMLType, Sequence[int], bytes | bytearray | memoryview]],
    metadata: Mapping[str, MetadataValue] | None = None,
    *,
    version: int = 3,
    alignment: int = 32,
) -> Path:
    """Writes a file of the given tensors: name to type, row-major shape and data; returns its path.

    Raises ``ValueError`` where data is not as long as type and shape say.
    """
    specs, _ = lay_out(((name, kind, shape) for name, (kind, shape, _) in tensors.items()), alignment)
    target = Path(path)
    with target.open("wb") as file:
        file.write(encode_header(metadata or {}, specs, version=version, alignment=alignment))
        for spec in specs:
            data = memoryview(tensors[spec.name][2]).cast("B")
            if len(data) != spec.nbytes:
                raise ValueError(f"tensor {spec.name!r} takes {spec.nbytes} bytes, not {len(data)}")
            file.write(data)
            file.write(bytes(-spec.nbytes % alignment))
    return target


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _encode_value(value: MetadataValue) -> bytes:
    plain = value.value if isinstance(value, Typed) else value
    if isinstance(plain, str | int | float):
        kind = value.type if isinstance(value, Typed) else _natural_type([plain])
        return struct.pack("<I", kind) + _encode_elements(kind, [plain])
    kind = value.type if isinstance(value, Typed) else _natural_type(plain)
    return struct.pack("<IIQ", ValueType.ARRAY, kind, len(plain)) + _encode_elements(kind, plain)


def _encode_elements(kind: ValueType, elements: Sequence[PlainValue]) -> bytes:
    if kind is ValueType.STRING:
        return b"".join(_string(str(element)) for element in elements)
    return struct.pack(f"<{len(elements)}{_ELEMENT_FORMATS[kind]}", *elements)


def _natural_type(elements: Sequence[PlainValue]) -> ValueType:
    first = elements[0] if elements else 0
    if isinstance(first, str):
        return ValueType.STRING
    if isinstance(first, bool):
        return ValueType.BOOL
    if isinstance(first, float):
        return ValueType.FLOAT32
    integers = [int(element) for element in elements]
    low, high = min(integers, default=-1), max(integers, default=0)
    if low < 0:
        return ValueType.INT32 if low >= -(1 << 31) and high < 1 << 31 else ValueType.INT64
    return ValueType.UINT32 if high < 1 << 32 else ValueType.UINT64
