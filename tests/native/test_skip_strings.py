"""C++ passes over the strings of an array as Python does."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncload.gguf._strings import LENGTH, skip_strings_in_python

pytestmark = pytest.mark.native

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
