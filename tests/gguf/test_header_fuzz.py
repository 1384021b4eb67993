"""Mutated headers: each is refused with a ``FormatError`` or read, alike in any pieces, and what is read is sound."""

from __future__ import annotations

import struct
from contextlib import suppress
from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from asyncload.errors import FormatError
from asyncload.gguf import Array, GGMLType, Header, HeaderParser
from asyncload.testing import encode_header, lay_out
from tests.attacks.attacks import gguf, tensor, valid
from tests.gguf import ggml


def _tensors() -> bytes:
    shapes = {GGMLType.F32: (3, 5), GGMLType.Q4_K: (2, 256), GGMLType.Q8_0: (1, 2, 3, 32), GGMLType.I8: ()}
    specs, nbytes = lay_out([(f"blk.{kind % 3}.{kind.name}", kind, shape) for kind, shape in shapes.items()], 64)
    return encode_header({"general.architecture": "x"}, specs, alignment=64) + bytes(nbytes)


SEEDS = [
    valid(),
    _tensors(),
    gguf(tensors=[tensor(b"a", (16,), 0, 64), tensor(b"b", (0,), 8, 0), tensor(b"c", (8,), 0, 0)], data=bytes(160)),
]
SMALL = [0, 1, 2, 7, 8, 9, 12, 13, 31, 32, 33, 63, 64, 127, 255, 256, 65535, 65536]
EDGES = [1 << 31, 1 << 32, 1 << 61, 1 << 62, 1 << 63, 1 << 64]
NASTY = SMALL + [edge + away for edge in EDGES for away in (-33, -32, -8, -1, 0, 1, 8)]

positions = st.integers(0, 700)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid file with one to four things done to it."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(positions) % (len(data) + 1)
        match draw(st.sampled_from(["flip", "overwrite", "overwrite", "truncate", "splice", "insert", "remove"])):
            case "flip":
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "overwrite":
                width = draw(st.sampled_from([4, 8]))
                value = draw(st.sampled_from(NASTY)) % (1 << 8 * width)
                data[at : at + width] = value.to_bytes(width, "little")
            case "truncate":
                del data[at:]
            case "splice":
                start = draw(positions) % (len(data) + 1)
                data[at:at] = data[start : start + draw(st.integers(1, 80))]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=16))
            case _:
                del data[at : at + draw(st.integers(1, 16))]
    return bytes(data)


def outcome(data: bytes, cuts: list[int], *, strict: bool = False) -> tuple[object, ...] | Header:
    """The header, or the error's type, text and offset."""
    parser = HeaderParser(len(data), strict=strict)
    edges = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    refusal: FormatError | None = None
    for start, end in pairwise(edges):
        assert parser.needed <= len(data)
        try:
            parser.feed(data[start:end])
        except FormatError as error:
            refusal = error
            break
    if refusal is not None:
        assert 0 <= refusal.offset <= len(data)
        return type(refusal), str(refusal), refusal.offset
    assert parser.header is not None
    return parser.header


def bits(value: object) -> object:
    """A value that is equal to itself even where it is no number."""
    return struct.pack("<d", value) if isinstance(value, float) else value


def check(header: Header, data: bytes) -> None:
    """What is read can be used without another look."""
    end = 0
    for info in sorted(header.tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        assert info.nbytes == info.type.nbytes(info.n_weights)
        assert info.shape == () or info.shape[-1] % info.type.block_size == 0
        assert header.data_offset <= info.offset
        assert info.offset + info.nbytes <= len(data)
        assert (info.offset - header.data_offset) % header.alignment == 0
        assert info.nbytes == 0 or info.offset >= end
        end = max(end, info.offset + info.nbytes)
        assert info.name
        assert "\0" not in info.name
    assert header.nbytes == sum(info.nbytes for info in header.tensors.values())
    assert sum(map(len, header.layers.values())) == sum(info.layer is not None for info in header.tensors.values())
    for value in header.metadata.values():
        if isinstance(value, Array):
            with suppress(FormatError):  # a string that is not UTF-8
                assert len(value[:]) == len(value)


@given(data=mutated(), cuts=st.lists(st.integers(0, 900), max_size=12))
@example(data=SEEDS[0], cuts=list(range(900)))
@example(data=SEEDS[1], cuts=list(range(900)))
@example(data=SEEDS[2], cuts=list(range(900)))
def test_any_bytes_are_refused_or_read_alike_in_any_pieces(data: bytes, cuts: list[int]) -> None:
    whole, apart = outcome(data, []), outcome(data, cuts)
    if isinstance(whole, Header):
        assert isinstance(apart, Header)
        assert apart.tensors == whole.tensors
        assert apart.layers == whole.layers
        assert {k: bits(v) for k, v in apart.metadata.items()} == {k: bits(v) for k, v in whole.metadata.items()}
        check(whole, data)
    else:
        assert apart == whole


@given(data=mutated())
@example(data=SEEDS[0])
@example(data=SEEDS[1])
def test_what_strict_reads_lenient_and_ggml_read_alike(data: bytes) -> None:
    strict = outcome(data, [], strict=True)
    if not isinstance(strict, Header):
        return
    lenient, theirs = outcome(data, []), ggml.read_header(data)
    assert isinstance(lenient, Header)
    assert lenient.tensors == strict.tensors
    assert isinstance(theirs, dict), theirs
    assert theirs["keys"] == list(strict.metadata)
    assert theirs["alignment"] == strict.alignment
    assert theirs["tensors"] == {info.name: (info.type, info.offset, info.nbytes) for info in strict.tensors.values()}


@given(data=st.binary(max_size=200))
def test_random_bytes_after_the_magic_number_are_refused_or_read(data: bytes) -> None:
    for start in (b"", b"GGUF", b"GGUF\3\0\0\0"):
        outcome(start + data, [5, 9, 24])
