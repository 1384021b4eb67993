"""Synthetic models: the layout of real ones, valid blocks of every type, the same bytes for the same arguments."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from asyncload.errors import OptionsError
from asyncload.gguf import Array, GGMLType, Header, HeaderParser, join_parts, split_paths
from asyncload.testing import _synthesize, lay_out, random_blocks, synthesize
from asyncload.testing._presets import PRESETS, tensors_of
from tests.gguf import ggml


def read(path: Path) -> Header:
    parser = HeaderParser(path.stat().st_size, strict=True)
    with path.open("rb") as file:
        while parser.header is None:
            parser.feed(file.read(1 << 20))
    return parser.header


def tensor_bytes(path: Path, header: Header | None = None) -> dict[str, bytes]:
    data = path.read_bytes()
    header = header or read(path)
    return {info.name: data[info.offset : info.offset + info.nbytes] for info in header.tensors.values()}


# --- the layout of real models ---------------------------------------------------------------------------------------

# What llama.cpp prints of the real files: tensors by type.
REAL = {
    ("llama-8b", "Q4_K_M"): {"F32": 66, "Q4_K": 193, "Q6_K": 33},
    ("llama-8b", "Q8_0"): {"F32": 66, "Q8_0": 226},
    ("llama-8b", "Q4_0"): {"F32": 66, "Q4_0": 225, "Q6_K": 1},
    ("llama-8b", "F16"): {"F32": 66, "F16": 226},
    ("llama-1b", "Q4_K_M"): {"F32": 34, "Q4_K": 96, "Q6_K": 17},
    ("qwen3-32b", "Q4_K_M"): {"F32": 257, "Q4_K": 385, "Q6_K": 65},
}


@pytest.mark.parametrize(("preset", "quant"), REAL)
def test_types_are_those_of_the_real_model(preset: str, quant: str) -> None:
    tensors = tensors_of(PRESETS[preset], quant)
    assert Counter(kind.name for _, kind, _ in tensors) == REAL[preset, quant]


def test_sizes_are_those_of_the_real_model() -> None:
    tensors = tensors_of(PRESETS["llama-8b"], "Q4_K_M")
    specs, nbytes = lay_out(tensors)
    assert sum(int(np.prod(spec.shape)) for spec in specs if spec.name != "rope_freqs.weight") == 8_030_261_248
    assert nbytes == pytest.approx(4.92e9, rel=0.002)
    types = {name: kind for name, kind, _ in tensors}
    assert types["output.weight"] is GGMLType.Q6_K
    assert types["token_embd.weight"] is GGMLType.Q4_K
    more = [layer for layer in range(32) if types[f"blk.{layer}.attn_v.weight"] is GGMLType.Q6_K]
    assert more == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert more == [layer for layer in range(32) if types[f"blk.{layer}.ffn_down.weight"] is GGMLType.Q6_K]


def test_metadata_say_what_a_reader_builds_a_llama_from(tmp_path: Path) -> None:
    (path,) = synthesize(tmp_path / "tiny.gguf", preset="tiny")
    header = read(path)
    wanted = {
        "block_count": 4,
        "context_length": 2048,
        "embedding_length": header.tensors["blk.0.ffn_down.weight"].shape[0],
        "feed_forward_length": header.tensors["blk.0.ffn_down.weight"].shape[1],
        "attention.head_count": 5,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "rope.dimension_count": 64,
        "rope.freq_base": 500000.0,
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
    }
    assert header.metadata["general.architecture"] == "llama"
    assert {key: header.metadata[f"llama.{key}"] for key in wanted} == wanted


def test_metadata_say_what_a_reader_builds_a_gemma_from(tmp_path: Path) -> None:
    (path,) = synthesize(tmp_path / "gemma.gguf", preset="tiny-gemma", layers=2)
    header = read(path)
    wanted = {
        "block_count": 2,
        "embedding_length": header.tensors["token_embd.weight"].shape[1],
        "attention.key_length": header.tensors["blk.1.attn_q_norm.weight"].shape[0],
        "attention.sliding_window": 16,
        "rope.freq_base": 1e6,
    }
    assert header.metadata["general.architecture"] == "gemma3"
    assert {key: header.metadata[f"gemma3.{key}"] for key in wanted} == wanted
    of_layer = {info.name.removeprefix("blk.1.").removesuffix(".weight") for info in header.layers[1]}
    norms = {"attn_norm", "attn_q_norm", "attn_k_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"}
    assert of_layer - norms == {
        *("attn_q", "attn_k", "attn_v", "attn_output"),
        *("ffn_gate", "ffn_up", "ffn_down"),
    }
    assert norms <= of_layer
    assert set(header.tensors) - {info.name for layer in header.layers.values() for info in layer} == {
        "token_embd.weight",
        "output_norm.weight",
    }


def test_tiny_has_rows_that_are_no_multiple_of_256(tmp_path: Path) -> None:
    (path,) = synthesize(tmp_path / "tiny.gguf", preset="tiny")
    tensors = read(path).tensors
    types = {name: info.type for name, info in tensors.items()}
    assert types["blk.0.attn_q.weight"] is GGMLType.Q5_0
    assert types["blk.3.attn_v.weight"] is types["output.weight"] is GGMLType.Q8_0
    assert types["blk.0.ffn_down.weight"] is GGMLType.Q4_K
    assert types["blk.3.ffn_down.weight"] is GGMLType.Q6_K
    assert types["blk.1.attn_norm.weight"] is GGMLType.F32
    assert 1 << 20 < path.stat().st_size < 8 << 20


# --- the blocks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in GGMLType if not kind.integer])
def test_every_weight_of_every_type_is_a_small_number(kind: GGMLType) -> None:
    blocks = random_blocks(kind, 500 if kind.quantized else 20000, seed=1)
    n_weights = len(blocks) * kind.block_size
    if kind is GGMLType.F32:
        weights: Any = blocks.view(np.float32)
    elif kind is GGMLType.F64:
        weights = blocks.view(np.float64)
    else:
        weights = ggml.decode(kind, blocks.tobytes(), n_weights)
    if weights is None:
        assert kind is GGMLType.Q8_1 or kind is GGMLType.Q8_K
        return
    assert np.isfinite(weights).all()
    assert np.abs(weights).max() < 200
    assert 1e-4 < np.abs(weights).mean() < 20
    assert len(np.unique(weights)) > 30
    assert not kind.quantized or len(np.unique(blocks, axis=0)) == len(blocks)


@pytest.mark.parametrize("kind", [GGMLType.Q8_1, GGMLType.Q8_K])
def test_activations_carry_their_sums(kind: GGMLType) -> None:
    blocks = random_blocks(kind, 50, seed=1)
    if kind is GGMLType.Q8_K:
        codes = blocks[:, 4:260].view(np.int8).astype(int).reshape(50, 16, 16)
        assert np.array_equal(codes.sum(axis=2), np.ascontiguousarray(blocks[:, 260:]).view(np.int16))
        assert np.isfinite(np.ascontiguousarray(blocks[:, :4]).view(np.float32)).all()
    else:
        codes = blocks[:, 4:].view(np.int8).astype(int)
        scale, total = np.ascontiguousarray(blocks[:, :4]).view(np.float16).astype(float).T
        assert np.allclose(scale * codes.sum(axis=1), total, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.TQ1_0, gguf.GGMLQuantizationType.TQ2_0])
def test_ternary_blocks_are_what_quantizing_gives(kind: gguf.GGMLQuantizationType) -> None:
    blocks = random_blocks(GGMLType(kind), 64, seed=2)
    assert np.array_equal(gguf.quants.quantize(gguf.quants.dequantize(blocks, kind), kind), blocks)


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q6_K", "BF16", "F16", "MXFP4", "IQ1_M"])
def test_gguf_py_decodes_them_as_ggml_does(kind: str) -> None:
    blocks = random_blocks(GGMLType[kind], 64, seed=2)
    theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    ours = ggml.decode(GGMLType[kind], blocks.tobytes(), theirs.size)
    assert ours is not None
    assert np.array_equal(theirs.ravel(), ours)


def test_integers_take_their_whole_range() -> None:
    for kind in (GGMLType.I8, GGMLType.I16, GGMLType.I32, GGMLType.I64):
        numbers = random_blocks(kind, 5000, seed=3).view(f"<i{kind.type_size}")
        limits = np.iinfo(numbers.dtype)
        assert numbers.min() < limits.min * 0.99
        assert numbers.max() > limits.max * 0.99


# --- the files -------------------------------------------------------------------------------------------------------


def test_all_has_a_tensor_of_every_type(tmp_path: Path) -> None:
    (path,) = synthesize(tmp_path / "all.gguf", preset="tiny", quant="all")
    assert {info.type for info in read(path).tensors.values()} == set(GGMLType)
    assert isinstance(ggml.read_header(path.read_bytes()), dict)


@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q4_0", "Q8_0", "Q4_K_M", "all"])
def test_the_same_arguments_give_the_same_bytes(tmp_path: Path, quant: str) -> None:
    first, again, other = (
        synthesize(tmp_path / f"{number}.gguf", preset="tiny", quant=quant, seed=seed)[0].read_bytes()
        for number, seed in enumerate((5, 5, 6))
    )
    assert first == again
    assert first != other
    assert len(first) == len(other)


def test_no_two_tensors_are_alike(tmp_path: Path) -> None:
    contents = tensor_bytes(synthesize(tmp_path / "tiny.gguf", preset="tiny", quant="all")[0])
    assert len(set(contents.values())) == len(contents)


@pytest.mark.parametrize("quant", ["F32", "BF16", "Q8_0"])
def test_weights_repeat_without_two_chunks_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str) -> None:
    """Tensors larger than what is generated: everything is written, in whole blocks, at odd distances."""
    monkeypatch.setattr(_synthesize, "_POOL_BYTES", 64 << 10)
    monkeypatch.setattr(_synthesize, "_JOB_BYTES", 100_000)
    (path,) = synthesize(tmp_path / "tiny.gguf", preset="tiny", quant=quant, layers=1)
    header = read(path)
    contents = tensor_bytes(path, header)
    data = contents["output.weight"]
    assert len(data) > 4 * (64 << 10)
    for size in (32 << 10, 64 << 10):
        chunks = [data[at : at + size] for at in range(0, len(data), size)]
        assert len(set(chunks)) == len(chunks)
    for name, info in header.tensors.items():
        if info.type is GGMLType.Q8_0:
            weights = ggml.decode(info.type, contents[name], info.n_weights)
            assert weights is not None
            assert np.isfinite(weights).all()
            assert np.abs(weights).max() < 1


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_parts_hold_what_one_file_holds(tmp_path: Path, parts: int) -> None:
    (alone,) = synthesize(tmp_path / "alone.gguf", preset="tiny", seed=3)
    paths = synthesize(tmp_path / "split.gguf", preset="tiny", seed=3, parts=parts)
    assert [str(path) for path in paths] == split_paths(str(paths[-1]), parts)
    headers = [read(path) for path in paths]
    joined = join_parts(headers, [str(path) for path in paths])
    assert list(joined.tensors) == list(read(alone).tensors)
    contents: dict[str, bytes] = {}
    for path, header in zip(paths, headers, strict=True):
        assert header.tensors
        contents |= tensor_bytes(path, header)
    assert contents == tensor_bytes(alone)


def test_layers_and_vocabulary_can_be_chosen(tmp_path: Path) -> None:
    (path,) = synthesize(tmp_path / "tiny.gguf", preset="tiny", layers=2, vocabulary=3000, alignment=4096)
    header = read(path)
    assert list(header.layers) == [0, 1]
    assert header.metadata["llama.block_count"] == 2
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, Array)
    assert len(tokens) == len(set(tokens)) == 3000
    assert header.alignment == 4096


def test_nothing_else_is_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"what was there before")
    assert synthesize(path, preset="tiny") == [path]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ({"preset": "gpt"}, "preset"),
        ({"preset": "tiny", "quant": "Q9"}, "quant"),
        ({"preset": "tiny", "layers": 0}, "layers"),
        ({"preset": "tiny", "parts": 0}, "parts"),
        ({"preset": "tiny", "parts": 1000}, "parts"),
    ],
)
def test_what_it_does_not_know_is_refused(tmp_path: Path, arguments: dict[str, Any], option: str) -> None:
    with pytest.raises(OptionsError) as caught:
        synthesize(tmp_path / "x.gguf", **arguments)
    assert caught.value.option == option
    assert not list(tmp_path.iterdir())


def test_importing_the_rooms_loads_nothing_heavy() -> None:
    code = (
        "import sys, asyncload.gguf, asyncload.testing; "
        "sys.exit(str([name for name in ('numpy', 'gguf', 'numba') if name in sys.modules] or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
