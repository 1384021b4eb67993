"""Hostile files: one small generator for each way in which bytes can try to hurt their reader.

Each is a GGUF that is well formed but for one thing. ``ATTACKS`` has them by name, with what must be said of them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from asyncload.errors import FormatError, TruncatedError, UnsupportedTypeError

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
TYPE_F32, TYPE_Q4_0, TYPE_Q4_K, TYPE_F64 = 0, 2, 12, 28
TWO_TO_64: Final = 1 << 64


class Attack(NamedTuple):
    """A hostile file and what is wrong with it: the error, and a pattern that its message matches."""

    data: bytes
    error: type[FormatError]
    says: str


ATTACKS: dict[str, Callable[[], Attack]] = {}


def attack(says: str, error: type[FormatError] = FormatError) -> Callable[[Callable[[], bytes]], Callable[[], bytes]]:
    """Enters a generator in ``ATTACKS`` under its own name."""

    def enter(generate: Callable[[], bytes]) -> Callable[[], bytes]:
        ATTACKS[generate.__name__] = lambda: Attack(generate(), error, says)
        return generate

    return enter


# --- bricks ---------------------------------------------------------------------------------------------------------


def uint(value: int, nbytes: int = 8) -> bytes:
    """A little-endian integer; what does not fit wraps, as it would in C."""
    return (value % (1 << 8 * nbytes)).to_bytes(nbytes, "little")


def string(text: bytes, length: int | None = None) -> bytes:
    """A string, with the length that it has or with another."""
    return uint(len(text) if length is None else length) + text


def pair(key: bytes, kind: int, payload: bytes) -> bytes:
    """A metadata key with its value."""
    return string(key) + uint(kind, 4) + payload


def array(kind: int, count: int, payload: bytes) -> bytes:
    """The payload of an array."""
    return uint(kind, 4) + uint(count) + payload


def tensor(
    name: bytes = b"t",
    shape: Sequence[int] = (8,),
    kind: int = TYPE_F32,
    offset: int = 0,
    dimensions: int | None = None,
) -> bytes:
    """A tensor's entry; ``shape`` as the file has it, rows first."""
    count = len(shape) if dimensions is None else dimensions
    return string(name) + uint(count, 4) + b"".join(map(uint, shape)) + uint(kind, 4) + uint(offset)


def gguf(
    pairs: Iterable[bytes] = (),
    tensors: Iterable[bytes] = (),
    data: bytes = b"",
    *,
    version: bytes = uint(3, 4),
    n_pairs: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A file; ``data`` follows the header's padding where there is any."""
    pairs, tensors = list(pairs), list(tensors)
    counts = uint(len(tensors) if n_tensors is None else n_tensors) + uint(len(pairs) if n_pairs is None else n_pairs)
    header = b"".join((b"GGUF", version, counts, *pairs, *tensors))
    return header + bytes(-len(header) % alignment) + data if data else header


def valid() -> bytes:
    """A file with every kind of value and two tensors, with which nothing is wrong."""
    letters = "B", "b", "H", "h", "I", "i", "f", "Q", "q", "d"
    scalars = list(zip((U8, I8, U16, I16, U32, I32, F32, U64, I64, F64), letters, strict=True))
    pairs = [pair(f"k.{kind}".encode(), kind, struct.pack(f"<{letter}", 7)) for kind, letter in scalars]
    pairs += [
        pair(f"a.{kind}".encode(), ARRAY, array(kind, 3, struct.pack(f"<3{letter}", 7, 8, 9)))
        for kind, letter in scalars
    ]
    pairs += [
        pair(b"general.alignment", U32, uint(32, 4)),
        pair(b"bool", BOOL, b"\1"),
        pair(b"bools", ARRAY, array(BOOL, 3, b"\0\1\1")),
        pair(b"text", STRING, string("größe".encode())),
        pair(b"texts", ARRAY, array(STRING, 70, b"".join(string(bytes([97 + i % 26]) * (i % 9)) for i in range(70)))),
        pair(b"nothing", ARRAY, array(STRING, 0, b"")),
    ]
    tensors = [tensor(b"blk.0.a", (8,), TYPE_F32, 0), tensor(b"blk.1.b", (32, 2), TYPE_Q4_0, 32)]
    return gguf(pairs, tensors, bytes(range(1, 33)) + bytes(64))


# --- the beginning --------------------------------------------------------------------------------------------------


@attack("magic number .* past the end", TruncatedError)
def empty_file() -> bytes:
    return b""


@attack("magic number .* past the end", TruncatedError)
def half_a_magic_number() -> bytes:
    return b"GG"


@attack("begins with b'GGML'")
def another_magic_number() -> bytes:
    return b"GGML" + gguf()[4:]


@attack("the version .* past the end", TruncatedError)
def ends_after_the_magic_number() -> bytes:
    return b"GGUF"


@attack("number of tensors and keys .* past the end", TruncatedError)
def ends_after_the_version() -> bytes:
    return b"GGUF" + uint(3, 4)


@attack(r"big-endian GGUF \(version 3\)")
def big_endian() -> bytes:
    return gguf(version=(3).to_bytes(4, "big"))


@attack(r"big-endian GGUF \(version 2\)")
def big_endian_version_2() -> bytes:
    return gguf(version=(2).to_bytes(4, "big"))


@attack("version 0:")
def version_0() -> bytes:
    return gguf(version=bytes(4))


@attack("version 1:")
def version_1() -> bytes:
    return gguf(version=uint(1, 4))


@attack("version 4:")
def version_of_the_future() -> bytes:
    return gguf(version=uint(4, 4))


@attack("version 4294967295:")
def version_all_ones() -> bytes:
    return gguf(version=uint(-1, 4))


# --- counts ---------------------------------------------------------------------------------------------------------


@attack("number of tensors is negative")
def negative_number_of_tensors() -> bytes:
    return gguf(n_tensors=-1)


@attack("number of metadata keys is negative")
def negative_number_of_keys() -> bytes:
    return gguf(n_pairs=-(1 << 63))


@attack("tensors do not fit", TruncatedError)
def more_tensors_than_fit() -> bytes:
    return gguf(tensors=[tensor()], data=bytes(32), n_tensors=1 << 60)


@attack("metadata keys do not fit", TruncatedError)
def more_keys_than_fit() -> bytes:
    return gguf([pair(b"k", U8, b"\0")], n_pairs=(1 << 63) - 1)


@attack("tensors do not fit", TruncatedError)
def number_of_tensors_times_their_size_wraps() -> bytes:
    return gguf(tensors=[tensor()], data=bytes(32), n_tensors=TWO_TO_64 // 32)


@attack("past the end", TruncatedError)
def one_key_more_than_there_is() -> bytes:
    return gguf([pair(b"a" * 30, U8, b"\0")], n_pairs=2)


@attack("past the end", TruncatedError)
def one_tensor_more_than_there_is() -> bytes:
    return gguf(tensors=[tensor(b"n" * 30)], n_tensors=2)


@attack("2097152 metadata keys are more than")
def millions_of_keys() -> bytes:
    return gguf([bytes((2 << 20) * 14)], n_pairs=2 << 20)


@attack("1500000 tensors are more than")
def millions_of_tensors() -> bytes:
    return gguf(tensors=[bytes(1_500_000 * 25)], n_tensors=1_500_000)


# --- lengths --------------------------------------------------------------------------------------------------------


@attack("a metadata key .* past the end", TruncatedError)
def key_longer_than_the_file() -> bytes:
    return gguf([string(b"key", 4000) + uint(U8, 4) + b"\0"])


@attack("a metadata key .* past the end", TruncatedError)
def key_of_all_ones() -> bytes:
    return gguf([string(b"key", -1) + uint(U8, 4) + b"\0"])


@attack("a metadata key .* past the end", TruncatedError)
def key_length_that_wraps_to_zero_in_32_bits() -> bytes:
    return gguf([string(b"key", 1 << 32) + uint(U8, 4) + b"\0"])


@attack("a metadata key of 65536 bytes is longer")
def key_longer_than_the_format_allows() -> bytes:
    return gguf([pair(b"k" * 65536, U8, b"\0")])


@attack("a metadata string .* past the end", TruncatedError)
def string_one_byte_longer_than_the_file() -> bytes:
    return gguf([pair(b"k", STRING, string(b"abc", 4))])


@attack("a metadata string .* past the end", TruncatedError)
def string_that_wraps_to_its_own_start() -> bytes:
    return gguf([pair(b"k", STRING, string(b"abc", -8))])


@attack("a tensor's name .* past the end", TruncatedError)
def name_longer_than_the_file() -> bytes:
    return gguf(tensors=[string(b"name", 1 << 63) + bytes(40)])


@attack("a tensor's name of 70000 bytes is longer")
def name_that_fills_a_page() -> bytes:
    return gguf(tensors=[tensor(b"n" * 70000)], data=bytes(32))


@attack("an array of 33 UINT8 .* past the end", TruncatedError)
def array_one_element_longer_than_the_file() -> bytes:
    return gguf([pair(b"k", ARRAY, array(U8, 33, bytes(32)))])


@attack("an array of 18446744073709551615 UINT8 .* past the end", TruncatedError)
def array_of_all_ones() -> bytes:
    return gguf([pair(b"k", ARRAY, array(U8, -1, bytes(32)))])


@attack("an array of 2305843009213693952 UINT64 .* past the end", TruncatedError)
def array_whose_size_wraps_to_zero() -> bytes:
    return gguf([pair(b"k", ARRAY, array(U64, TWO_TO_64 // 8, bytes(32)))])


@attack("an array of 4611686018427387905 FLOAT32 .* past the end", TruncatedError)
def array_whose_size_wraps_to_four() -> bytes:
    return gguf([pair(b"k", ARRAY, array(F32, TWO_TO_64 // 4 + 1, bytes(32)))])


@attack("1152921504606846976 strings do not fit", TruncatedError)
def array_of_more_strings_than_fit() -> bytes:
    return gguf([pair(b"k", ARRAY, array(STRING, 1 << 60, string(b"a") * 4))])


@attack("2305843009213693953 strings do not fit", TruncatedError)
def array_of_strings_whose_lengths_wrap_to_eight_bytes() -> bytes:
    return gguf([pair(b"k", ARRAY, array(STRING, TWO_TO_64 // 8 + 1, string(b"a") * 4))])


@attack("a string in an array reaches past the end", TruncatedError)
def string_in_an_array_longer_than_the_file() -> bytes:
    return gguf([pair(b"k", ARRAY, array(STRING, 3, string(b"a") + string(b"b", 1000) + string(b"c")))])


@attack("a string in an array reaches past the end", TruncatedError)
def string_in_an_array_that_wraps_to_its_own_start() -> bytes:
    return gguf([pair(b"k", ARRAY, array(STRING, 3, string(b"a", -8) * 3))])


@attack("a string in an array reaches past the end", TruncatedError)
def last_string_in_an_array_one_byte_too_long() -> bytes:
    return gguf([pair(b"k", ARRAY, array(STRING, 2, string(b"ab") + string(b"ab", 3)))])


@attack("past the end", TruncatedError)
def strings_that_eat_up_the_lengths_of_the_others() -> bytes:
    return gguf([pair(b"k", ARRAY, array(STRING, 4, string(b"a" * 24) + string(b"b" * 8)))])


@attack("more than|makes the header larger|past the end", TruncatedError)
def many_empty_strings_and_no_end() -> bytes:
    return gguf([pair(b"k", ARRAY, array(STRING, 20000, bytes(8 * 20000))), string(b"x", 5)], n_pairs=2)


# --- metadata -------------------------------------------------------------------------------------------------------


@attack("no type 13 of metadata values")
def unknown_value_type() -> bytes:
    return gguf([pair(b"k", 13, bytes(8))])


@attack("no type -1 of metadata values")
def negative_value_type() -> bytes:
    return gguf([pair(b"k", -1, bytes(8))])


@attack("no type 255 of metadata values")
def array_of_an_unknown_type() -> bytes:
    return gguf([pair(b"k", ARRAY, array(255, 1, bytes(8)))])


@attack("an array of arrays")
def nested_array() -> bytes:
    return gguf([pair(b"k", ARRAY, array(ARRAY, 1, array(U8, 1, b"\0")))])


@attack("an array of arrays")
def arrays_nested_a_thousand_deep() -> bytes:
    return gguf([pair(b"k", ARRAY, array(ARRAY, 1, b"") * 1000 + array(U8, 1, b"\0"))])


@attack("a bool is 2")
def bool_of_2() -> bytes:
    return gguf([pair(b"k", BOOL, b"\2")])


@attack("a bool is 255")
def bool_of_255() -> bytes:
    return gguf([pair(b"k", BOOL, b"\xff")])


@attack("a bool is 3")
def array_with_a_bool_of_3() -> bytes:
    return gguf([pair(b"k", ARRAY, array(BOOL, 5, b"\0\1\1\3\2"))])


@attack("a metadata key is empty")
def empty_key() -> bytes:
    return gguf([pair(b"", U8, b"\0"), pair(b"key", U8, b"\0")])


@attack("a metadata key 'a.*b' has a NUL")
def key_with_a_nul() -> bytes:
    return gguf([pair(b"a\0b", U8, b"\0")])


@attack("has a NUL")
def keys_equal_up_to_a_nul() -> bytes:
    return gguf([pair(b"a", U8, b"\0"), pair(b"a\0b", U8, b"\1")])


@attack("a metadata key is not UTF-8")
def key_that_is_not_utf_8() -> bytes:
    return gguf([pair(b"ab\xff", U8, b"\0")])


@attack("a metadata key is not UTF-8")
def key_with_an_overlong_slash() -> bytes:
    return gguf([pair(b"a\xc0\xafb", U8, b"\0")])


@attack("a metadata key is not UTF-8")
def key_with_a_surrogate() -> bytes:
    return gguf([pair(b"\xed\xa0\x80", U8, b"\0")])


@attack("a metadata string is not UTF-8")
def string_that_ends_inside_a_character() -> bytes:
    return gguf([pair(b"k", STRING, string("größe".encode()[:3]))])


@attack("the metadata key 'k' is there twice")
def key_twice() -> bytes:
    return gguf([pair(b"k", U8, b"\0"), pair(b"l", U8, b"\0"), pair(b"k", STRING, string(b"x"))])


@attack("general.alignment is 0, no power of two")
def alignment_of_zero() -> bytes:
    return gguf([pair(b"general.alignment", U32, uint(0, 4))], [tensor()], bytes(32))


@attack("general.alignment is 48, no power of two")
def alignment_of_48() -> bytes:
    return gguf([pair(b"general.alignment", U32, uint(48, 4))], [tensor()], bytes(64))


@attack("general.alignment is a UINT64")
def alignment_of_64_bits() -> bytes:
    return gguf([pair(b"general.alignment", U64, uint(32))], [tensor()], bytes(32))


@attack("general.alignment is a INT32")
def alignment_with_a_sign() -> bytes:
    return gguf([pair(b"general.alignment", I32, uint(32, 4))], [tensor()], bytes(32))


@attack("general.alignment is a STRING")
def alignment_in_words() -> bytes:
    return gguf([pair(b"general.alignment", STRING, string(b"32"))], [tensor()], bytes(32))


@attack("general.alignment is a ARRAY")
def alignment_in_an_array() -> bytes:
    return gguf([pair(b"general.alignment", ARRAY, array(U32, 1, uint(32, 4)))], [tensor()], bytes(32))


@attack("general.alignment is a BOOL")
def alignment_of_true() -> bytes:
    return gguf([pair(b"general.alignment", BOOL, b"\1")], [tensor()], bytes(32))


@attack("ends before the data", TruncatedError)
def alignment_beyond_the_end() -> bytes:
    return gguf([pair(b"general.alignment", U32, uint(1 << 31, 4))], [tensor()], bytes(32))


# --- tensors --------------------------------------------------------------------------------------------------------


@attack("a tensor's name is empty")
def empty_name() -> bytes:
    return gguf(tensors=[tensor(b"")], data=bytes(32))


@attack("a tensor's name 't.*x' has a NUL")
def name_with_a_nul() -> bytes:
    return gguf(tensors=[tensor(b"t\0x")], data=bytes(32))


@attack("has a NUL")
def names_equal_up_to_a_nul() -> bytes:
    return gguf(tensors=[tensor(b"t"), tensor(b"t\0x", offset=32)], data=bytes(64))


@attack("a tensor's name is not UTF-8")
def name_that_is_not_utf_8() -> bytes:
    return gguf(tensors=[tensor(b"\xfe\xff")], data=bytes(32))


@attack("tensor 't' is there twice")
def name_twice() -> bytes:
    return gguf(tensors=[tensor(b"t"), tensor(b"t", offset=32)], data=bytes(64))


@attack("5 dimensions, more than 4")
def five_dimensions() -> bytes:
    return gguf(tensors=[tensor(shape=(2, 2, 2, 1, 1))], data=bytes(32))


@attack("4294967295 dimensions, more than 4")
def four_billion_dimensions() -> bytes:
    return gguf(tensors=[tensor(dimensions=-1)], data=bytes(32))


@attack("more weights than can be counted")
def weights_that_wrap_to_zero() -> bytes:
    return gguf(tensors=[tensor(shape=(1 << 32, 1 << 32))], data=bytes(32))


@attack("more weights than can be counted")
def weights_that_wrap_to_eight() -> bytes:
    # (2**61 + 1) * 8 = 2**64 + 8
    return gguf(tensors=[tensor(shape=((1 << 61) + 1, 8))], data=bytes(32))


@attack("more weights than can be counted")
def weights_that_overflow_beside_a_zero() -> bytes:
    return gguf(tensors=[tensor(shape=(0, 1 << 32, 1 << 32))], data=bytes(32))


@attack("reaches past the end", TruncatedError)
def bytes_that_wrap_to_zero() -> bytes:
    return gguf(tensors=[tensor(shape=(1 << 31, 1 << 31))], data=bytes(32))


@attack("reaches past the end", TruncatedError)
def bytes_that_wrap_to_eight() -> bytes:
    return gguf(tensors=[tensor(shape=((1 << 61) + 1,), kind=TYPE_F64)], data=bytes(32))


@attack("negative dimension")
def negative_dimension() -> bytes:
    return gguf(tensors=[tensor(shape=(-1,))], data=bytes(32))


@attack("negative dimension")
def two_negative_dimensions() -> bytes:
    return gguf(tensors=[tensor(shape=(-4, -2))], data=bytes(32))


@attack("negative dimension")
def negative_dimension_beside_a_zero() -> bytes:
    return gguf(tensors=[tensor(shape=(0, -(1 << 63)))], data=bytes(32))


@attack("rows of 33 weights, no multiple of Q4_0's 32")
def rows_that_do_not_fill_their_blocks() -> bytes:
    return gguf(tensors=[tensor(shape=(33,), kind=TYPE_Q4_0)], data=bytes(64))


@attack("rows of 128 weights, no multiple of Q4_K's 256")
def rows_that_fill_blocks_only_together() -> bytes:
    return gguf(tensors=[tensor(shape=(128, 2), kind=TYPE_Q4_K)], data=bytes(160))


@attack("rows of 1 weights")
def quantized_scalar() -> bytes:
    return gguf(tensors=[tensor(shape=(), kind=TYPE_Q4_0)], data=bytes(32))


def _of_type(number: int, says: str) -> Callable[[], Attack]:
    """An attack whose only tensor is of a type that there is not."""
    return lambda: Attack(
        gguf(tensors=[tensor(shape=(256,), kind=number)], data=bytes(1024)), UnsupportedTypeError, says
    )


REMOVED: Final = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}
ATTACKS.update(
    {f"removed_type_{n}": _of_type(n, rf"type {name} \(id {n}\), which ggml has") for n, name in REMOVED.items()}
)
ATTACKS.update(
    {f"type_{n}_of_a_fork": _of_type(n, f"type id {n}, which ggml does not") for n in (43, 97, 139, 2**31 - 1)}
)
ATTACKS.update({f"negative_type_{-n}": _of_type(n, f"type id {n}, which does not exist") for n in (-1, -(2**31))})


# --- data -----------------------------------------------------------------------------------------------------------


@attack("ends before the data", TruncatedError)
def no_data_at_all() -> bytes:
    return gguf(tensors=[tensor()])


@attack("data of tensor 't' reaches past the end", TruncatedError)
def data_one_byte_short() -> bytes:
    return gguf(tensors=[tensor()], data=bytes(31))


@attack("data of tensor 'u' reaches past the end", TruncatedError)
def data_of_the_second_tensor_missing() -> bytes:
    return gguf(tensors=[tensor(), tensor(b"u", offset=32)], data=bytes(32))


@attack("begins at 16, no multiple of 32")
def data_misaligned() -> bytes:
    return gguf(tensors=[tensor(offset=16)], data=bytes(64))


@attack("begins at 32, no multiple of 64")
def data_misaligned_for_another_alignment() -> bytes:
    pairs = [pair(b"general.alignment", U32, uint(64, 4))]
    return gguf(pairs, [tensor(), tensor(b"u", offset=32)], bytes(128), alignment=64)


@attack("reaches past the end", TruncatedError)
def data_beyond_the_end() -> bytes:
    return gguf(tensors=[tensor(offset=1 << 40)], data=bytes(32))


@attack("reaches past the end", TruncatedError)
def data_offset_that_wraps_to_the_header() -> bytes:
    return gguf(tensors=[tensor(offset=-32)], data=bytes(32))


@attack("reaches past the end", TruncatedError)
def data_offset_and_size_that_wrap_to_zero() -> bytes:
    # the size is 4 times 2**32, so that the end is at 2**64
    return gguf(tensors=[tensor(shape=(1 << 32,), offset=-(1 << 34))], data=bytes(32))


@attack("reaches past the end", TruncatedError)
def empty_tensor_beyond_the_end() -> bytes:
    return gguf(tensors=[tensor(shape=(0,), offset=1 << 32)], data=bytes(32))


@attack("data of tensors 't' and 'u' overlaps")
def data_of_two_tensors_in_one_place() -> bytes:
    return gguf(tensors=[tensor(), tensor(b"u")], data=bytes(32))


@attack("data of tensors 't' and 'u' overlaps")
def data_that_begins_inside_another() -> bytes:
    return gguf(tensors=[tensor(shape=(24,)), tensor(b"u", offset=64)], data=bytes(96))


@attack("data of tensors 't' and 'v' overlaps")
def data_inside_another_and_out_of_order() -> bytes:
    entries = [tensor(b"u", offset=128), tensor(b"v", offset=32), tensor(b"t", shape=(24,), offset=0)]
    return gguf(tensors=entries, data=bytes(160))


@attack("data of tensors 'n0' and 'n1' overlaps")
def thousands_of_tensors_in_one_place() -> bytes:
    return gguf(tensors=[tensor(f"n{number}".encode()) for number in range(3000)], data=bytes(32))
