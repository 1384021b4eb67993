"""C++ passes over the strings of an array, and reads the entries of tensors, as Python does."""

from __future__ import annotations

import random
import struct
from array import array
from typing import TypeVar
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncload.errors import FormatError
from asyncload.gguf import Header, HeaderParser, _tensors
from asyncload.gguf._strings import LENGTH, skip_strings_in_python

pytestmark = pytest.mark.native

T = TypeVar("T")

LARGEST = (1 << 64) - 1


@given(
    texts=st.lists(st.binary(max_size=20), max_size=40),
    before=st.integers(0, 9),
    wrong=st.one_of(
        st.none(), st.tuples(st.integers(0, 39), st.sampled_from([1 << 20, 1 << 63, LARGEST - 8, LARGEST]))
    ),
    cut=st.integers(0, 1200),
    first=st.integers(0, 200),
    count=st.integers(0, 50),
    every=st.integers(1, 70),
)
def test_both_say_the_same(
    *, texts: list[bytes], before: int, wrong: tuple[int, int] | None, cut: int, first: int, count: int, every: int
) -> None:
    from asyncload_native import skip_strings

    buffer = bytearray(before)
    for index, text in enumerate(texts):
        length = wrong[1] if wrong and wrong[0] == index else len(text)
        buffer += LENGTH.pack(length) + text
    del buffer[max(before, cut) :]
    passed, end, last, marks = skip_strings(buffer, before, first, count, every)
    in_python = skip_strings_in_python(buffer, before, first, count, every)
    assert (passed, last, marks) == (in_python[0], *in_python[2:])
    assert end == min(in_python[1], LARGEST)


def test_what_is_passed_over_and_what_is_marked() -> None:
    from asyncload_native import skip_strings

    buffer = bytearray(b"".join(LENGTH.pack(size) + bytes(size) for size in range(6)))
    for skip in (skip_strings, skip_strings_in_python):
        starts = array("Q", [0, 8, 17, 27, 38, 50])
        assert skip(buffer, 0, 0, 6, 2) == (6, len(buffer), 50, starts[::2].tobytes())
        assert skip(buffer, 8, 1, 6, 2) == (5, len(buffer), 50, starts[2::2].tobytes())
        assert skip(buffer, 8, 1, 2, 3) == (2, 27, 17, b"")
        assert skip(buffer[:-1], 38, 4, 2, 5) == (2, len(buffer), 50, starts[5:].tobytes())  # the last is not all there
        assert skip(buffer[:57], 38, 4, 2, 5) == (1, 50, 38, b"")  # nor is a length
        assert skip(buffer[:4], 0, 0, 1, 1) == (0, 0, 0, b"")
    with pytest.raises(ValueError, match="every"):
        skip_strings(buffer, 0, 0, 6, 0)


class Dice:
    """Entries of tensors, one field in thirty of which is not as it should be."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def mostly(self, good: T, *bad: T) -> T:
        """What is good, as a rule."""
        return self._random.choice(bad) if self._random.random() < 1 / 30 else good

    def below(self, end: int) -> int:
        """Any number from 0 on."""
        return self._random.randrange(end)

    def entry(self) -> bytes:
        """One of them."""
        name = self.mostly(b"%d\xc3\xbc" % self.below(1000), b"", b"\xff", b"a\0", b"n" * 70, b"a" * 65536)
        length = self.mostly(len(name), 1 << 20, LARGEST)
        large = (1 << 31, 1 << 62, (1 << 63) - 1, 1 << 63, LARGEST)
        dimensions = [self.mostly(32 << self.below(9), 0, 1, *large) for _ in range(self.below(5))]
        count = self.mostly(len(dimensions), 5, 1 << 31)
        kind = self.mostly(8 if dimensions else 0, 4, 31, 99, 0xFFFFFFFF)
        offset = self.mostly(self.below(1 << 20) << 20, LARGEST, 1)
        return LENGTH.pack(length) + name + struct.pack(f"<I{len(dimensions)}QIQ", count, *dimensions, kind, offset)


def outcome(data: bytes, piece: int, *, strict: bool) -> tuple[object, ...]:
    parser = HeaderParser(1 << 40, strict=strict)
    try:
        for at in range(0, len(data), piece):
            parser.feed(data[at : at + piece])
    except FormatError as error:
        return type(error), str(error), error.offset
    return parser.header, parser.needed


def test_entries_are_what_they_are_in_python() -> None:
    whole = 0
    for seed in range(2000):
        dice = Dice(seed)
        count, strict = dice.below(40), dice.mostly(False, True)
        data = struct.pack("<4sIqq", b"GGUF", 3, count, 0) + b"".join(dice.entry() for _ in range(count))
        data = data[: len(data) - dice.mostly(0, 1, 9, 30, 70)]
        piece = dice.mostly(1 << 20, 7, 50)
        found = outcome(data, piece, strict=strict)
        with mock.patch.object(_tensors, "_in_cpp", None):
            assert found == outcome(data, piece, strict=strict), seed
        whole += isinstance(found[0], Header)
    assert whole > 100


def test_good_entries_are_read_in_cpp() -> None:
    from asyncload_native import read_entries

    good = [
        LENGTH.pack(2) + b"ab" + struct.pack("<IQQIQ", 2, 3, 4, 8, 96),
        LENGTH.pack(2) + "\u00fc".encode() + struct.pack("<IIQ", 0, 0, 7),
        LENGTH.pack(1) + b"c" + struct.pack("<IQQQQIQ", 4, 1 << 31, 1 << 31, 1, 1, 1, LARGEST),
    ]
    data = bytearray(b"header" + b"".join(good))
    assert read_entries(data, 6, 9, 2) == [
        ("ab", (4, 3), 8, 96, 48),
        ("\u00fc", (), 0, 7, 74),
        ("c", (1, 1, 1 << 31, 1 << 31), 1, LARGEST, 131),
    ]
    assert [name for name, *_ in read_entries(data, 6, 2, 2)] == ["ab", "\u00fc"]
    assert read_entries(data, 6, 9, 1) == []
    assert len(read_entries(data[:-1], 6, 9, 2)) == 2
    assert read_entries(data, 1 << 62, 9, 2) == []


def test_the_parser_reads_good_entries_in_cpp() -> None:
    count = 100
    entry = struct.Struct("<Q3sIQIQ")
    entries = b"".join(entry.pack(3, b"%03d" % index, 1, 8, 0, 32 * index) for index in range(count))
    data = struct.pack("<4sIqq", b"GGUF", 3, count, 0) + entries
    with mock.patch.object(_tensors, "_raw_entry", side_effect=AssertionError):
        header, _ = outcome(data, len(data), strict=False)
    assert isinstance(header, Header)
    assert list(header.tensors) == [f"{index:03}" for index in range(count)]
