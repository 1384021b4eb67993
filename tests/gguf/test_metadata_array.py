"""Arrays of metadata: sequences that are decoded when they are asked."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncload.errors import FormatError
from asyncload.gguf import Array, HeaderParser, Scalar, ValueType
from asyncload.testing import Typed, encode_header
from tests.attacks.attacks import ARRAY, STRING, array, gguf, pair, string

WORDS = [f"{number}" * (number % 5) for number in range(300)] + ["größe", "▁the", "🙂", "nul\0inside"]
VALUES: list[tuple[ValueType, list[Scalar]]] = [
    (ValueType.UINT8, [0, 255]),
    (ValueType.INT8, [-128, 127]),
    (ValueType.UINT16, [0, 65535]),
    (ValueType.INT16, [-32768, 5]),
    (ValueType.UINT32, [1, (1 << 32) - 1]),
    (ValueType.INT32, [-1, -(1 << 31)]),
    (ValueType.FLOAT32, [0.5, -2.25]),
    (ValueType.BOOL, [True, False, True]),
    (ValueType.STRING, list(WORDS)),
    (ValueType.UINT64, [(1 << 64) - 1]),
    (ValueType.INT64, [-(1 << 63)]),
    (ValueType.FLOAT64, [0.1, 1e300]),
    (ValueType.STRING, []),
    (ValueType.INT32, []),
]


def read(data: bytes, key: str = "k") -> Array:
    parser = HeaderParser(len(data), url="model.gguf")
    parser.feed(data)
    assert parser.header is not None
    value = parser.header.metadata[key]
    assert isinstance(value, Array)
    return value


def read_back(kind: ValueType, values: Sequence[Scalar]) -> Array:
    return read(encode_header({"before": [1, 2], "k": Typed(kind, values), "after": "x"}, []))


@pytest.mark.parametrize(("kind", "values"), VALUES)
def test_gives_back_what_was_written(kind: ValueType, values: list[Scalar]) -> None:
    read = read_back(kind, values)
    assert read.type is kind
    assert len(read) == len(values)
    assert read[:] == values
    assert list(read) == values
    assert [read[i] for i in range(len(values))] == values
    assert [read[i] for i in range(-len(values), 0)] == values
    assert all(type(ours) is type(theirs) for ours, theirs in zip(read, values, strict=True))
    for outside in (len(values), -len(values) - 1):
        with pytest.raises(IndexError):
            read[outside]


@given(slice_=st.slices(len(WORDS)), numbers=st.booleans())
def test_slices_as_a_list_does(slice_: slice, numbers: bool) -> None:
    values: list[Scalar] = list(range(len(WORDS))) if numbers else list(WORDS)
    read = read_back(ValueType.INT16 if numbers else ValueType.STRING, values)
    assert read[slice_] == values[slice_]


def test_is_a_sequence() -> None:
    read = read_back(ValueType.STRING, WORDS)
    assert "🙂" in read
    assert read.index("größe") == 300
    assert list(reversed(read)) == WORDS[::-1]
    assert repr(read) == "Array(STRING, 304 elements)"


def test_equal_by_type_and_content() -> None:
    words = read_back(ValueType.STRING, ["a", "b"])
    assert words == read_back(ValueType.STRING, ["a", "b"])
    assert hash(words) == hash(read_back(ValueType.STRING, ["a", "b"]))
    assert words != read_back(ValueType.STRING, ["a", "c"])
    assert words != ["a", "b"]
    assert read_back(ValueType.UINT8, [1, 0]) != read_back(ValueType.BOOL, [True, False])


def test_bad_utf_8_is_found_when_it_is_read() -> None:
    strings = [string(b"good"), string(b"bad\xff"), string(b"good")]
    data = gguf([pair(b"k", ARRAY, array(STRING, 3, b"".join(strings)))])
    read_array = read(data)
    assert read_array[0] == read_array[2] == "good"
    for access in (lambda: read_array[1], lambda: read_array[:], lambda: list(read_array)):
        with pytest.raises(FormatError, match="not UTF-8") as caught:
            access()
        assert data[caught.value.offset] == 0xFF
        assert caught.value.url == "model.gguf"


def test_a_vocabulary_costs_nothing_until_it_is_asked_for() -> None:
    """Beside its own bytes a header of 262,144 tokens takes little, and reading a token next to nothing."""
    count = 1 << 18
    words = [f"▁{number}" for number in range(count)]
    data = encode_header(
        {"tokens": Typed(ValueType.STRING, words), "scores": Typed(ValueType.FLOAT32, [0.0] * count)}, []
    )
    parser = HeaderParser(len(data))
    tracemalloc.start()
    try:
        for at in range(0, len(data), 1 << 20):
            parser.feed(data[at : at + (1 << 20)])
        _, peak = tracemalloc.get_traced_memory()
        assert parser.header is not None
        tokens = parser.header.metadata["tokens"]
        assert isinstance(tokens, Array)
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        assert (tokens[0], tokens[count // 2], tokens[-1]) == (words[0], words[count // 2], words[-1])
        _, after = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.25 * len(data) + (2 << 20)
    assert after - before < 10_000
    assert list(tokens) == words
