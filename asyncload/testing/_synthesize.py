"""Models of realistic layout and size with random weights, written as fast as the disk takes them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

from asyncload.errors import OptionsError
from asyncload.gguf import GGMLType, ValueType
from asyncload.testing._blocks import random_blocks
from asyncload.testing._gguf_writer import MetadataValue, TensorSpec, Typed, encode_header, lay_out
from asyncload.testing._presets import PRESETS, QUANTS, Architecture, tensors_of

__all__ = ["synthesize"]

_POOL_BYTES: Final = 4 << 20
_JOB_BYTES: Final = 64 << 20
_THREADS: Final = 4


def synthesize(
    path: str | os.PathLike[str],
    *,
    preset: str = "llama-8b",
    quant: str = "Q4_K_M",
    seed: int = 0,
    layers: int | None = None,
    parts: int = 1,
    vocabulary: int = 64,
    alignment: int = 32,
) -> list[Path]:
    """Writes a well-formed GGUF model of random but valid blocks, and returns its path, or those of its parts.

    ``preset`` is ``"llama-8b"``, ``"llama-1b"``, ``"qwen3-32b"``, ``"tiny"`` or ``"tiny-gemma"`` (a few MB each),
    ``layers`` another number of layers than that model's. ``quant`` is ``"F32"``, ``"F16"``, ``"BF16"``, ``"Q4_0"``,
    ``"Q8_0"`` or ``"Q4_K_M"`` with the types that llama.cpp gives each tensor then, or ``"all"``: Q4_K_M and a tensor
    of every type.
    ``vocabulary`` is the number of tokens in the metadata (the embedding has the preset's rows whatever it is). With
    ``parts`` the model is split in that many files, ``name-00001-of-00003.gguf`` and so on. The same arguments give the
    same bytes; the weights repeat every few MB, never at a power of two. Blocks. Raises ``OptionsError`` for what it
    does not know.
    """
    if preset not in PRESETS:
        raise OptionsError(f"no preset is called {preset!r}: use one of {', '.join(PRESETS)}", option="preset")
    if quant not in QUANTS:
        raise OptionsError(f"no quant is called {quant!r}: use one of {', '.join(QUANTS)}", option="quant")
    if layers is not None and layers < 1:
        raise OptionsError(f"a model has one layer at least, not {layers}", option="layers")
    model = PRESETS[preset].with_layers(layers)
    tensors = tensors_of(model, quant)
    if not 1 <= parts <= len(tensors):
        raise OptionsError(f"{len(tensors)} tensors go into 1 to {len(tensors)} parts, not {parts}", option="parts")
    weights = _Weights(tensors, seed)
    metadata = _metadata(model, quant, vocabulary)
    target = Path(path)
    paths: list[Path] = []
    for part in range(parts):
        name = target
        pairs = dict(metadata) if part == 0 else {}
        if parts > 1:
            name = target.with_name(f"{target.stem}-{part + 1:05}-of-{parts:05}.gguf")
            pairs |= {
                "split.no": Typed(ValueType.UINT16, part),
                "split.count": Typed(ValueType.UINT16, parts),
                "split.tensors.count": Typed(ValueType.INT32, len(tensors)),
            }
        share = tensors[len(tensors) * part // parts : len(tensors) * (part + 1) // parts]
        specs, nbytes = lay_out(share, alignment)
        _write(name, encode_header(pairs, specs, alignment=alignment), specs, nbytes, weights)
        paths.append(name)
    return paths


class _Weights:
    """The blocks of all tensors: for each type one pool, through which the tensors of that type go round and round."""

    def __init__(self, tensors: Sequence[tuple[str, GGMLType, tuple[int, ...]]], seed: int) -> None:
        specs, _ = lay_out(tensors)
        self._starts: dict[str, int] = {}
        totals: dict[GGMLType, int] = {}
        for spec in specs:
            self._starts[spec.name] = totals.get(spec.type, 0)
            totals[spec.type] = self._starts[spec.name] + spec.nbytes // spec.type.type_size
        # An odd number of blocks: no chunk's size is a multiple of the pool's, so no two chunks are alike.
        self._pools: Mapping[GGMLType, memoryview] = {
            kind: random_blocks(kind, min(total, _POOL_BYTES // kind.type_size) | 1, seed).data.cast("B")
            for kind, total in totals.items()
        }

    def pieces(self, spec: TensorSpec, begin: int, end: int) -> Iterator[memoryview]:
        """The bytes of a tensor from ``begin`` up to ``end``, in as many views as it takes."""
        pool = self._pools[spec.type]
        at = (self._starts[spec.name] * spec.type.type_size + begin) % len(pool)
        while begin < end:
            piece = pool[at : at + end - begin]
            yield piece
            begin += len(piece)
            at = 0


class _Job(NamedTuple):
    """A range of a tensor's bytes to be written at ``offset``."""

    spec: TensorSpec
    begin: int
    end: int
    offset: int


def _write(path: Path, header: bytes, specs: Sequence[TensorSpec], nbytes: int, weights: _Weights) -> None:
    """Writes beside ``path`` and renames, so that no half of a model is ever taken for one."""
    beside = path.with_name(f"{path.name}.partial")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.truncate(descriptor, len(header) + nbytes)
        os.pwrite(descriptor, header, 0)

        def write(job: _Job) -> None:
            offset = job.offset
            for piece in weights.pieces(job.spec, job.begin, job.end):
                view = piece
                while view:
                    written = os.pwrite(descriptor, view, offset)
                    view, offset = view[written:], offset + written

        with ThreadPoolExecutor(_THREADS, thread_name_prefix="synthesize") as threads:
            for _ in threads.map(write, _jobs(specs, len(header))):
                pass
    finally:
        os.close(descriptor)
    beside.replace(path)


def _jobs(specs: Sequence[TensorSpec], data_offset: int) -> Iterator[_Job]:
    for spec in specs:
        for begin in range(0, spec.nbytes, _JOB_BYTES):
            end = min(begin + _JOB_BYTES, spec.nbytes)
            yield _Job(spec, begin, end, data_offset + spec.offset + begin)


def _metadata(model: Architecture, quant: str, vocabulary: int) -> dict[str, MetadataValue]:
    return {
        "general.architecture": model.family,
        "general.type": "model",
        "general.name": f"Synthetic {model.title}",
        "general.file_type": QUANTS[quant][-1],
        "general.quantization_version": 2,
        **{f"{model.family}.{key}": value for key, value in _sizes(model).items()},
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": Typed(ValueType.STRING, [f"▁token{number}" for number in range(vocabulary)]),
        "tokenizer.ggml.scores": Typed(ValueType.FLOAT32, [-float(number) for number in range(vocabulary)]),
        "tokenizer.ggml.token_type": Typed(ValueType.INT32, [1] * vocabulary),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
    }


def _sizes(model: Architecture) -> dict[str, MetadataValue]:
    sizes: dict[str, MetadataValue] = {
        "block_count": model.layers,
        "context_length": model.context,
        "embedding_length": model.embedding,
        "feed_forward_length": model.feed_forward,
        "attention.head_count": model.heads,
        "attention.head_count_kv": model.kv_heads,
        "attention.key_length": model.head_size,
        "attention.value_length": model.head_size,
    }
    if model.family != "llama":
        sizes |= {"attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e6}
        return sizes | {"attention.sliding_window": model.window} if model.family == "gemma3" else sizes
    return sizes | {
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 500000.0,
        "rope.dimension_count": model.head_size,
        "vocab_size": model.rows,
    }
