"""The writer of small files, which other tests stand on."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncload.gguf import Array, GGMLType, HeaderParser, ValueType
from asyncload.testing import MetadataValue, Typed, encode_header, lay_out, write_gguf


def kind_of(value: MetadataValue) -> tuple[int, int]:
    """The type of a value as it is written, and that of its elements if it is an array."""
    header = encode_header({"k": value}, [])
    at = 24 + 8 + 1
    return int.from_bytes(header[at : at + 4], "little"), int.from_bytes(header[at + 4 : at + 8], "little")


def test_writes_tensors_where_the_header_says(tmp_path: Path) -> None:
    tensors = {
        "a": (GGMLType.F32, (3,), bytes(range(12))),
        "b": (GGMLType.Q4_0, (2, 32), b"b" * 36),
        "empty": (GGMLType.F16, (0, 4), b""),
        "c": (GGMLType.I64, (), b"12345678"),
    }
    path = write_gguf(tmp_path / "small.gguf", tensors, {"name": "small"}, alignment=64, version=2)
    data = path.read_bytes()
    parser = HeaderParser(len(data), strict=True)
    parser.feed(data)
    header = parser.header
    assert header is not None
    assert (header.version, header.alignment, header.metadata["name"]) == (2, 64, "small")
    for name, (kind, shape, content) in tensors.items():
        info = header.tensors[name]
        assert (info.type, info.shape) == (kind, shape)
        assert data[info.offset : info.offset + info.nbytes] == content


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (5, ValueType.UINT32),
        (-5, ValueType.INT32),
        (1 << 40, ValueType.UINT64),
        (-(1 << 40), ValueType.INT64),
        (0.5, ValueType.FLOAT32),
        (False, ValueType.BOOL),
        ("text", ValueType.STRING),
        (Typed(ValueType.UINT16, 5), ValueType.UINT16),
    ],
)
def test_values_have_their_natural_types(value: float | str | Typed, kind: ValueType) -> None:
    assert kind_of(value)[0] == kind
    if not isinstance(value, Typed):
        assert kind_of([value]) == (ValueType.ARRAY, kind)


def test_arrays_of_both_signs_and_of_nothing() -> None:
    assert kind_of([1, -1]) == (ValueType.ARRAY, ValueType.INT32)
    assert kind_of([]) == (ValueType.ARRAY, ValueType.INT32)
    assert kind_of(Typed(ValueType.STRING, [])) == (ValueType.ARRAY, ValueType.STRING)
    assert kind_of(("a", "b")) == (ValueType.ARRAY, ValueType.STRING)


def test_array_values_come_back(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "values.gguf", {}, {"words": ["a", "ü"], "scores": [0.5, -1.0]})
    parser = HeaderParser(path.stat().st_size, strict=True)
    parser.feed(path.read_bytes())
    assert parser.header is not None
    words, scores = parser.header.metadata["words"], parser.header.metadata["scores"]
    assert isinstance(words, Array)
    assert isinstance(scores, Array)
    assert (words[:], scores[:]) == (["a", "ü"], [0.5, -1.0])


def test_data_of_a_wrong_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'a' takes 12 bytes, not 11"):
        write_gguf(tmp_path / "wrong.gguf", {"a": (GGMLType.F32, (3,), bytes(11))})
    with pytest.raises(ValueError, match="no whole blocks"):
        lay_out([("a", GGMLType.Q4_0, (3,))])
