"""What strict accepts, ggml accepts; what ggml accepts and strict does not is known."""

from __future__ import annotations

import pytest

from asyncload.errors import FormatError
from asyncload.gguf import HeaderParser
from tests.attacks.attacks import ATTACKS, gguf, tensor, valid
from tests.gguf import ggml

# Files in which ggml sees nothing wrong, and what it does with them.
STRICTER = {
    "bool_of_2": "takes all but 0 for true",
    "bool_of_255": "takes all but 0 for true",
    "array_with_a_bool_of_3": "takes all but 0 for true",
    "key_longer_than_the_format_allows": "has no limit for keys",
    "key_with_a_nul": "keeps the key, which C callers see end there",
    "keys_equal_up_to_a_nul": "keeps both, and finds the first for either",
    "key_that_is_not_utf_8": "looks at no character",
    "key_with_an_overlong_slash": "looks at no character",
    "key_with_a_surrogate": "looks at no character",
    "string_that_ends_inside_a_character": "looks at no character",
    "empty_name": "takes it",
    "name_with_a_nul": "sees the name end there",
    "name_that_is_not_utf_8": "looks at no character",
    "weights_that_wrap_to_zero": "counts none, and takes the tensor for empty",
    "weights_that_overflow_beside_a_zero": "counts none",
}

# Where real writers differ from ggml's.
DIFFERENT = {
    "a gap between tensors": gguf(tensors=[tensor(), tensor(b"u", offset=96)], data=bytes(128)),
    "a gap before the first": gguf(tensors=[tensor(offset=64)], data=bytes(96)),
    "another order": gguf(tensors=[tensor(offset=32), tensor(b"u", offset=0)], data=bytes(64)),
    "no padding after the last": gguf(tensors=[tensor(shape=(9,))], data=bytes(36)),
    "a name of 64 bytes": gguf(tensors=[tensor(b"n" * 64)], data=bytes(32)),
    "an empty tensor inside another, in another order": gguf(
        tensors=[tensor(b"u", offset=96), tensor(shape=(24,)), tensor(b"v", (0,), offset=64)], data=bytes(128)
    ),
    "an empty tensor inside another": gguf(
        tensors=[tensor(shape=(24,)), tensor(b"u", (0,), offset=64)], data=bytes(96)
    ),
}

ACCEPTED = {
    "a valid file": valid(),
    "a zero dimension": gguf(tensors=[tensor(shape=(0, 7))], data=bytes(32)),
    "no dimension": gguf(tensors=[tensor(shape=())], data=bytes(32)),
    "trailing bytes": gguf(tensors=[tensor()], data=bytes(32) + b"and more"),
    "a name of 63 bytes": gguf(tensors=[tensor(b"n" * 63)], data=bytes(32)),
    "nothing at all": gguf(),
    "padding after the last": gguf(tensors=[tensor(shape=(9,))], data=bytes(64)),
}


def strictly(data: bytes) -> bool:
    parser = HeaderParser(len(data), strict=True)
    try:
        parser.feed(data)
    except FormatError:
        return False
    assert parser.header is not None
    return True


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_what_strict_refuses_ggml_refuses_too_but_for_what_is_known(name: str) -> None:
    data = ATTACKS[name]().data
    assert not strictly(data)
    assert isinstance(ggml.read_header(data), str) == (name not in STRICTER)


@pytest.mark.parametrize("what", sorted(DIFFERENT))
def test_lenient_reads_what_strict_and_ggml_refuse(what: str) -> None:
    data = DIFFERENT[what]
    lenient = HeaderParser(len(data))
    lenient.feed(data)
    assert lenient.header is not None
    assert not strictly(data)
    assert isinstance(ggml.read_header(data), str)


@pytest.mark.parametrize("what", sorted(ACCEPTED))
def test_ggml_reads_what_strict_reads(what: str) -> None:
    data = ACCEPTED[what]
    assert strictly(data)
    assert isinstance(ggml.read_header(data), dict)
