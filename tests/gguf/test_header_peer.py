"""What gguf-py writes, and what it reads, is what the parser reads; so is what the writer in ``testing`` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from asyncload.gguf import Array, GGMLType, Header, HeaderParser
from asyncload.testing import MetadataValue, encode_header, lay_out, synthesize
from tests.gguf import ggml


def parse(path: Path, *, strict: bool = True) -> Header:
    parser = HeaderParser(path.stat().st_size, strict=strict)
    parser.feed(path.read_bytes())
    assert parser.header is not None
    return parser.header


def plain(value: Any) -> Any:
    """A value of the metadata as GGUFReader gives it."""
    return value[:] if isinstance(value, Array) else value


def assert_read_alike(path: Path) -> Header:
    header, reader = parse(path), gguf.GGUFReader(path)
    theirs = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert {key: plain(value) for key, value in header.metadata.items()} == theirs
    assert [
        (tensor.name, int(tensor.type), tensor.shape, tensor.offset, tensor.nbytes)
        for tensor in header.tensors.values()
    ] == [
        (tensor.name, int(tensor.tensor_type), tuple(map(int, tensor.shape[::-1])), tensor.data_offset, tensor.n_bytes)
        for tensor in reader.tensors
    ]
    assert header.alignment == reader.alignment
    return header


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A file with every kind of value and several types, as gguf-py writes it."""
    path = tmp_path / "written.gguf"
    writer: Any = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -100)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -30000)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -2_000_000_000)
    writer.add_uint64("u64", (1 << 64) - 1)
    writer.add_int64("i64", -(1 << 63))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_string("text", "größe\n🙂")
    writer.add_array("strings", ["a", "", "größe"] * 100)
    writer.add_array("integers", [1, -2, 3])
    writer.add_array("floats", [0.5, 1.5])
    writer.add_array("bools", [True, False])
    random = np.random.default_rng(0)
    for name, shape in (("token_embd.weight", (7, 64)), ("blk.0.a", (5,)), ("blk.1.b", (2, 3, 4)), ("s", (1,))):
        writer.add_tensor(name, random.standard_normal(shape, np.float32))
    for number, kind in enumerate((gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0)):
        blocks = gguf.quants.quantize(random.standard_normal((3, 96), np.float32), kind)
        writer.add_tensor(f"blk.{number}.q", blocks, raw_dtype=kind)
    writer.add_tensor("half", random.standard_normal((3, 5)).astype(np.float16))
    writer.add_tensor("integers", np.arange(11, dtype=np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_reads_what_gguf_py_writes_as_gguf_py_does(written: Path) -> None:
    header = assert_read_alike(written)
    assert header.alignment == 64
    assert header.tensors["blk.1.b"].shape == (2, 3, 4)


def test_reads_what_gguf_py_writes_as_ggml_does(written: Path) -> None:
    theirs = ggml.read_header(written.read_bytes())
    header = parse(written)
    assert isinstance(theirs, dict)
    assert theirs["keys"] == list(header.metadata)
    assert theirs["tensors"] == {
        tensor.name: (tensor.type, tensor.offset, tensor.nbytes) for tensor in header.tensors.values()
    }


def test_gguf_py_reads_what_synthesize_writes(tmp_path: Path) -> None:
    (path,) = synthesize(tmp_path / "tiny.gguf", preset="tiny", quant="Q4_K_M", vocabulary=100)
    header = assert_read_alike(path)
    assert len(header.layers) == header.metadata["llama.block_count"] == 4


@pytest.mark.parametrize("version", [2, 3])
def test_ggml_reads_what_the_writer_writes(version: int) -> None:
    specs, nbytes = lay_out([(f"blk.{int(kind)}.w", kind, (3, 256)) for kind in GGMLType], alignment=128)
    values: dict[str, MetadataValue] = {
        "one": 1,
        "minus": -1,
        "large": 1 << 40,
        "text": "x",
        "half": 0.5,
        "yes": True,
        "none": [],
        "words": ["a"],
    }
    data = encode_header(values, specs, version=version, alignment=128) + bytes(nbytes)
    theirs = ggml.read_header(data)
    assert isinstance(theirs, dict), theirs
    assert theirs["alignment"] == 128
    parser = HeaderParser(len(data), strict=True)
    parser.feed(data)
    assert parser.header is not None
    assert theirs["tensors"] == {
        tensor.name: (tensor.type, tensor.offset, tensor.nbytes) for tensor in parser.header.tensors.values()
    }
    assert {key: plain(value) for key, value in parser.header.metadata.items()} == {
        **values,
        "general.alignment": 128,
    }
