"""Whatever the bytes: a ``FormatError`` that says where, in time and memory bounded by the file's size."""

from __future__ import annotations

import re
import sys
import tracemalloc
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import pytest

from asyncload.errors import FormatError
from asyncload.gguf import Header, HeaderParser
from tests.attacks.attacks import ATTACKS, Attack, array, gguf, pair, string, tensor, uint, valid

# What parsing may cost for each byte of the file, and at all.
BYTES_A_BYTE, BYTES_AT_ALL = 16, 64 << 10
CALLS_A_BYTE, CALLS_AT_ALL = 2, 300


def parse(data: bytes, pieces: Iterable[int] = (), **options: Any) -> Header:
    """Feeds pieces of the given sizes, then the rest."""
    parser = HeaderParser(len(data), **options)
    at = 0
    for piece in pieces:
        parser.feed(data[at : at + piece])
        at += piece
        if parser.header is not None:
            return parser.header
        assert parser.needed <= len(data)
    parser.feed(data[at:])
    assert parser.header is not None
    return parser.header


def calls_of(function: Callable[[], object]) -> int:
    """How many calls, Python's and C's, a function makes: a measure of work that no machine changes."""
    calls = 0

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


@pytest.fixture(params=ATTACKS)
def attack(request: pytest.FixtureRequest) -> Attack:
    return ATTACKS[request.param]()


def refused(data: bytes, pieces: Iterable[int] = (), **options: Any) -> FormatError:
    with pytest.raises(FormatError) as caught:
        parse(data, pieces, **options)
    return caught.value


@pytest.mark.parametrize("strict", [False, True])
def test_is_refused_and_says_where(attack: Attack, strict: bool) -> None:
    error = refused(attack.data, strict=strict, url="model.gguf")
    assert 0 <= error.offset <= len(attack.data)
    assert error.url == "model.gguf"
    assert str(error.offset) in str(error)
    assert len(str(error)) < 500
    if not strict:
        assert type(error) is attack.error
        assert re.search(attack.says, str(error))


def test_is_refused_alike_in_pieces(attack: Attack) -> None:
    whole = refused(attack.data)
    pieces = [1] * 600 if len(attack.data) < 1 << 20 else [999] * 600
    apart = refused(attack.data, pieces)
    assert (type(apart), str(apart), apart.offset) == (type(whole), str(whole), whole.offset)


def test_takes_little_memory_and_few_steps(attack: Attack) -> None:
    def run() -> None:
        refused(attack.data)

    run()  # whatever is imported or cached on the way
    assert calls_of(run) <= CALLS_AT_ALL + CALLS_A_BYTE * len(attack.data)
    tracemalloc.start()
    try:
        run()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= BYTES_AT_ALL + BYTES_A_BYTE * len(attack.data)


def test_raises_the_same_again_when_fed_on(attack: Attack) -> None:
    parser = HeaderParser(len(attack.data))
    errors: list[FormatError] = []
    for _ in range(2):
        with pytest.raises(FormatError) as caught:
            parser.feed(attack.data)
        errors.append(caught.value)
    assert errors[0] is errors[1]
    assert parser.header is None


# What stands at the offset of the error.
CULPRITS = {
    "version_1": uint(1, 4),
    "more_tensors_than_fit": uint(1 << 60),
    "more_keys_than_fit": uint((1 << 63) - 1),
    "key_of_all_ones": uint(-1),
    "array_whose_size_wraps_to_zero": uint(1 << 61),
    "array_of_more_strings_than_fit": uint(1 << 60),
    "string_in_an_array_longer_than_the_file": uint(1000),
    "last_string_in_an_array_one_byte_too_long": uint(3) + b"ab",
    "unknown_value_type": uint(13, 4),
    "nested_array": uint(9, 4),
    "bool_of_2": b"\2",
    "array_with_a_bool_of_3": b"\3\2",
    "key_that_is_not_utf_8": b"\xff",
    "key_twice": string(b"k") + uint(8, 4),
    "alignment_of_64_bits": uint(10, 4) + uint(32),
    "name_twice": string(b"t"),
    "five_dimensions": uint(5, 4),
    "negative_dimension": uint(-1),
    "weights_that_wrap_to_eight": uint(8),
    "negative_dimension_beside_a_zero": uint(-(1 << 63)),
    "rows_that_do_not_fill_their_blocks": uint(33),
    "removed_type_36": uint(36, 4),
    "type_43_of_a_fork": uint(43, 4),
    "data_misaligned": uint(16),
    "data_beyond_the_end": uint(1 << 40),
}


@pytest.mark.parametrize("name", CULPRITS)
def test_the_offset_is_the_culprits(name: str) -> None:
    data = ATTACKS[name]().data
    assert data[refused(data).offset :].startswith(CULPRITS[name])


def test_the_brick_of_all_attacks_is_sound() -> None:
    header = parse(valid())
    assert [tensor.nbytes for tensor in header.tensors.values()] == [32, 36]
    assert header.metadata["text"] == "größe"


def test_every_truncation_is_refused() -> None:
    data = valid()
    for length in range(len(data) - 28):  # the last 28 bytes are padding
        error = refused(data[:length])
        assert 0 <= error.offset <= length


def test_bytes_behind_the_announced_end_change_nothing() -> None:
    data = valid()
    for length in range(len(data)):
        parser = HeaderParser(length)
        error: FormatError | None = None
        try:
            parser.feed(data)
        except FormatError as caught:
            error = caught
        assert str(error) == (str(refused(data[:length])) if length < len(data) - 28 else "None")


def test_a_file_cut_behind_its_last_tensor_is_whole_but_not_strictly() -> None:
    data = valid()[:-28]
    assert parse(data) == parse(valid())
    assert "past the end" in str(refused(data, strict=True))


# --- large valid files cost in proportion to their size --------------------------------------------------------------


def many_strings(count: int) -> bytes:
    return gguf([pair(b"k", 9, array(8, count, string(b"a") * count))])


def many_pairs(count: int) -> bytes:
    return gguf([pair(f"{number:05}".encode(), 0, b"\1") for number in range(count)])


def many_tensors(count: int) -> bytes:
    """Out of order, so that there is no short cut through the check for overlaps."""
    entries = [tensor(f"blk.{number}.".encode(), (), 24, 32 * (count - 1 - number)) for number in range(count)]
    return gguf(tensors=entries, data=bytes(32 * count))


def many_empty_tensors(count: int) -> bytes:
    """The most entries that a file can hold."""
    return gguf(tensors=[tensor(f"{number:x}".encode(), (0,)) for number in range(count)], data=bytes(32))


def many_bools(count: int) -> bytes:
    return gguf([pair(b"k", 9, array(7, 50 * count, b"\1" * (50 * count)))])


def one_long_string(count: int) -> bytes:
    return gguf([pair(b"k", 8, string(b"a" * 50 * count))])


LARGE = [many_strings, many_pairs, many_tensors, many_empty_tensors, many_bools, one_long_string]


@pytest.mark.parametrize("large", LARGE)
@pytest.mark.parametrize("piece", [1, 100, 1 << 30])
def test_time_is_linear_in_the_size(large: Callable[[int], bytes], piece: int) -> None:
    small_file, large_file = large(500), large(2000)

    def cost(data: bytes) -> int:
        return calls_of(lambda: parse(data, [piece] * (len(data) // piece)))

    assert cost(large_file) <= 5 * cost(small_file)


@pytest.mark.parametrize("large", LARGE)
def test_memory_is_a_small_multiple_of_the_size(large: Callable[[int], bytes]) -> None:
    data = large(20000)
    parse(data)
    tracemalloc.start()
    try:
        header = parse(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert header is not None
    assert peak <= BYTES_AT_ALL + BYTES_A_BYTE * len(data)


@pytest.mark.parametrize("large", LARGE)
def test_pauses_come_often_and_in_proportion(large: Callable[[int], bytes]) -> None:
    """Between two pauses no more is done than 64 KiB of plain bytes, a few thousand strings, or a hundred tensors."""
    pauses = 0

    def pause() -> None:
        nonlocal pauses
        pauses += 1

    data = large(20000)
    parser = HeaderParser(len(data), pause=pause)
    gaps: list[int] = []

    def feed() -> None:
        parser.feed(data)

    calls = 0
    seen = 0

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls, seen
        calls += event in ("call", "c_call")
        if pauses != seen:
            seen = pauses
            gaps.append(calls)
            calls = 0

    sys.setprofile(count)
    try:
        feed()
    finally:
        sys.setprofile(None)
    assert parser.header is not None
    assert len(gaps) >= len(data) // (512 << 10)
    assert max(gaps, default=0) <= 4000
    assert calls <= 4000  # after the last pause


def test_what_is_fed_beyond_the_header_is_not_kept() -> None:
    data = gguf([pair(b"k", 9, array(0, 3, b"abc"))], [tensor(shape=(1 << 20,))], bytes(4 << 20))
    parser = HeaderParser(len(data))
    tracemalloc.start()
    try:
        parser.feed(data)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert parser.header is not None
    assert kept < 64 << 10


def test_the_largest_header_is_bounded() -> None:
    """A header that says it is gigabytes long is refused before they are read."""
    start = gguf([string(b"k") + uint(9, 4) + array(0, 1 << 33, b"")])
    parser = HeaderParser(1 << 40)
    with pytest.raises(FormatError, match="makes the header larger than") as caught:
        parser.feed(start + bytes(100))
    assert caught.value.offset < len(start)
