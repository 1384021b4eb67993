"""Small models whose layers pass through slots."""

from __future__ import annotations

import os
from math import prod
from typing import Final

from asyncload.gguf import GGMLType
from asyncload.quant import DType, decode
from asyncload.testing._blocks import random_blocks
from asyncload.testing._gguf_writer import write_gguf

__all__ = ["write_layers"]

_NAMES: Final = ("attn_q", "ffn_down")
_COLUMNS: Final = 256


def write_layers(
    path: str | os.PathLike[str],
    layers: int,
    *,
    uneven: bool = True,
    rows: int = 32,
    type: GGMLType = GGMLType.Q8_0,  # noqa: A002 - the field's name
    dtype: str = "packed",
    seed: int = 0,
) -> dict[str, bytes]:
    """Writes a model of ``layers`` layers of random weights; returns each tensor's bytes as ``dtype``, by its name.

    A layer has two tensors of ``type`` with 256 columns, and with one to five times ``rows`` rows if the layers are
    ``uneven``, else three times; one tensor belongs to no layer. The bytes are those of the host's kernels. Blocks.
    Raises ``UnsupportedQuantError`` for a type that is not decoded to that dtype.
    """
    tensors: dict[str, tuple[GGMLType, tuple[int, ...], memoryview]] = {}

    def add(name: str, times: int) -> None:
        blocks = random_blocks(type, times * rows * _COLUMNS // type.block_size, seed + len(tensors))
        tensors[name] = type, (times * rows, _COLUMNS), blocks.data.cast("B")

    add("token_embd.weight", 1)
    for layer in range(layers):
        for name in _NAMES:
            add(f"blk.{layer}.{name}.weight", 1 + (layer * 7 + 1) % 5 if uneven else 3)
    write_gguf(path, tensors)
    return {name: _decoded(*tensor, dtype) for name, tensor in tensors.items()}


def _decoded(type: GGMLType, shape: tuple[int, ...], packed: memoryview, dtype: str) -> bytes:  # noqa: A002
    if dtype == "packed":
        return bytes(packed)
    target = DType.parse(dtype)
    weights = bytearray(prod(shape) * target.itemsize)
    decode(type, target, packed, memoryview(weights))
    return bytes(weights)
