"""What well-formed headers give, and what the parser lets through that ggml would not."""

from __future__ import annotations

import dataclasses

import pytest

from asyncload.errors import FormatError
from asyncload.gguf import GGMLType, Header, HeaderParser, TensorInfo, ValueType, _reader
from asyncload.testing import Typed, encode_header, lay_out
from tests.attacks.attacks import ARRAY, STRING, U32, array, gguf, pair, string, tensor, uint, valid


def parse(data: bytes, *, strict: bool = False) -> Header:
    parser = HeaderParser(len(data), strict=strict)
    parser.feed(data)
    assert parser.header is not None
    return parser.header


def test_a_header_says_what_the_file_says() -> None:
    data = valid()
    header = parse(data)
    assert (header.version, header.alignment, header.parts) == (3, 32, 1)
    assert header.nbytes == 68
    assert list(header.tensors) == ["blk.0.a", "blk.1.b"]
    first, second = header.tensors.values()
    assert first == TensorInfo("blk.0.a", GGMLType.F32, (8,), header.data_offset, 32)
    assert second.shape == (2, 32)  # row-major
    assert (second.n_weights, second.nbytes, second.type) == (64, 36, GGMLType.Q4_0)
    assert data[first.offset : first.offset + 32] == bytes(range(1, 33))
    assert header.data_offset % 32 == 0
    assert header.metadata["k.6"] == 7.0
    assert header.metadata["k.11"] == 7
    assert header.metadata["bool"] is True


def test_a_header_cannot_be_changed() -> None:
    header = parse(valid())
    with pytest.raises(dataclasses.FrozenInstanceError):
        header.version = 2  # type: ignore[misc]
    for mapping in (header.tensors, header.metadata, header.layers):
        with pytest.raises(TypeError):
            mapping["blk.0.a"] = None  # type: ignore[index]


@pytest.mark.parametrize("version", [2, 3])
def test_versions_2_and_3_are_read(version: int) -> None:
    header = parse(gguf([pair(b"k", U32, uint(5, 4))], [tensor()], bytes(32), version=uint(version, 4)))
    assert header.version == version
    assert header.metadata["k"] == 5


@pytest.mark.parametrize("piece", [1, 2, 7, 24, 25, 1000])
def test_pieces_of_any_size_give_the_same_header(piece: int) -> None:
    data = valid()
    parser = HeaderParser(len(data))
    for at in range(0, len(data), piece):
        assert parser.header is None
        assert at <= parser.needed <= len(data)
        parser.feed(memoryview(data)[at : at + piece])
        if parser.header is not None:
            break
    assert parser.header == parse(data)
    parser.feed(b"what comes after the header is ignored")
    assert parser.header == parse(data)


def test_a_header_that_ends_with_strings_waits_for_the_last_of_them() -> None:
    data = encode_header({"words": ["a", "bcd", "the last"]}, [])
    data = data[: data.index(b"the last") + 8]
    parser = HeaderParser(len(data))
    for at in range(len(data)):
        assert parser.header is None
        parser.feed(data[at : at + 1])
    assert parser.header is not None
    assert list(parser.header.metadata["words"]) == ["a", "bcd", "the last"]  # type: ignore[arg-type]


def test_what_is_needed_is_enough_and_not_too_much() -> None:
    """Feeding no more than it asks for, the parser never asks for a byte behind the header."""
    data = valid()
    header_size = parse(data).data_offset
    parser = HeaderParser(len(data))
    fed = 0
    while parser.header is None:
        needed = parser.needed
        assert fed < needed <= header_size
        parser.feed(data[fed:needed])
        fed = needed


def test_bytes_beyond_the_announced_size_are_not_looked_at() -> None:
    data = valid()
    parser = HeaderParser(20)
    with pytest.raises(FormatError, match="past the end"):
        parser.feed(data)


def test_a_file_without_tensors_has_no_data() -> None:
    data = gguf([pair(b"k", U32, uint(5, 4))])
    header = parse(data)
    assert not header.tensors
    assert header.data_offset == len(data)
    assert (header.nbytes, dict(header.layers)) == (0, {})


@pytest.mark.parametrize("alignment", [1, 2, 8, 64, 4096])
def test_every_power_of_two_aligns(alignment: int) -> None:
    specs, nbytes = lay_out([("a", GGMLType.I8, (3,)), ("b", GGMLType.I8, (5,))], alignment)
    data = encode_header({}, specs, alignment=alignment) + bytes(nbytes)
    header = parse(data, strict=True)
    assert header.alignment == alignment
    assert [tensor.offset % alignment for tensor in header.tensors.values()] == [0, 0]
    assert header.tensors["b"].offset - header.tensors["a"].offset == max(alignment, 3) if alignment > 2 else True


@pytest.mark.parametrize("shape", [(0,), (0, 7), (7, 0), (2, 0, 3, 4)])
def test_a_tensor_with_a_zero_dimension_is_valid(shape: tuple[int, ...]) -> None:
    data = gguf(tensors=[tensor(b"zero", shape), tensor(b"t")], data=bytes(32))
    for strict in (False, True):
        header = parse(data, strict=strict)
        zero = header.tensors["zero"]
        assert (zero.shape, zero.n_weights, zero.nbytes) == (shape[::-1], 0, 0)
        assert header.nbytes == 32


def test_a_tensor_without_dimensions_is_one_weight() -> None:
    scalar = parse(gguf(tensors=[tensor(shape=())], data=bytes(32)), strict=True).tensors["t"]
    assert (scalar.shape, scalar.n_weights, scalar.nbytes) == ((), 1, 4)


def test_tensors_are_grouped_by_layer() -> None:
    names = ["output", "blk.10.b", "blk.2.a", "blk.10.a", "blk.x.a", "blk.3", "blk..a", "xblk.1.a", "blk.٣.a"]
    specs, nbytes = lay_out([(name, GGMLType.F32, (8,)) for name in [*names, "blk.99999999999999999999.a"]])
    header = parse(encode_header({}, specs) + bytes(nbytes))
    assert {layer: [tensor.name for tensor in group] for layer, group in header.layers.items()} == {
        2: ["blk.2.a"],
        10: ["blk.10.b", "blk.10.a"],
    }
    assert list(header.layers) == [2, 10]
    assert header.tensors["blk.10.b"].layer == 10
    assert header.tensors["output"].layer is None


def test_thousands_of_layers_in_any_order_are_grouped() -> None:
    count = 2000
    specs, nbytes = lay_out([(f"blk.{(number * 777) % count}.w", GGMLType.I8, (1,)) for number in range(count)])
    header = parse(encode_header({}, specs) + bytes(nbytes))
    assert list(header.layers) == list(range(count))


def test_a_key_of_the_greatest_length_is_read() -> None:
    key = "k" * 65535
    assert parse(encode_header({key: Typed(ValueType.UINT32, 1)}, [])).metadata[key] == 1


def test_an_error_in_the_pause_ends_the_parser() -> None:
    def pause() -> None:
        raise KeyboardInterrupt

    specs, nbytes = lay_out([(f"t{number}", GGMLType.I8, (1,)) for number in range(200)])
    data = encode_header({}, specs) + bytes(nbytes)
    parser = HeaderParser(len(data), pause=pause)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            parser.feed(data)
    assert parser.header is None


def test_an_error_has_nothing_else_behind_it() -> None:
    for cut in (gguf([string(b"key", 400)]), gguf(tensors=[tensor()[:-4]], n_tensors=1)):
        with pytest.raises(FormatError) as caught:
            parse(cut)
        assert caught.value.__context__ is None


@pytest.mark.parametrize("piece", [7, 1 << 20])
def test_no_header_is_larger_than_the_limit_however_it_comes(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    data = gguf(tensors=[tensor(b"%d" % index * 20, offset=32 * index) for index in range(9)], data=bytes(9 * 32))
    assert len(parse(data).tensors) == 9
    monkeypatch.setattr(_reader, "_MAX_HEADER", 300)
    parser = HeaderParser(len(data))
    with pytest.raises(FormatError, match="makes the header larger than 300 bytes"):
        for at in range(0, len(data), piece):
            parser.feed(data[at : at + piece])


def test_a_tensor_that_is_there_twice_is_told_by_its_name() -> None:
    data = gguf(tensors=[tensor(b"twice"), tensor(b"twice", dimensions=9)])
    with pytest.raises(FormatError, match="'twice' is there twice"):
        parse(data)


def test_long_strings_are_more_work_than_short_ones() -> None:
    def pauses(length: int) -> int:
        calls: list[None] = []
        data = gguf([pair(b"k", ARRAY, array(STRING, 1000, string(bytes(length)) * 1000))])
        HeaderParser(len(data), pause=lambda: calls.append(None)).feed(data)
        return len(calls)

    assert pauses(4000) > 10 * max(pauses(10), 1)
