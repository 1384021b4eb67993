"""What computing takes beside weights and cache."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Final

from asyncload.gguf import Header
from asyncload.plan._metadata import ArchitectureMetadata
from asyncload.plan._shape import ModelShape

__all__ = ["workspace_nbytes"]

_FLOAT32: Final = 4
# The most that cuBLAS recommends: https://docs.nvidia.com/cuda/cublas/#cublassetworkspace.
_MATMUL: Final = 32 << 20

_Shapes = Mapping[str, tuple[int, ...]]


def workspace_nbytes(model: Header | ModelShape, *, context: int, batch: int) -> int:
    """An upper bound of the workspace in which ``batch`` tokens pass through a model, one layer at a time.

    Float32 throughout: for each token the layer's input and output, and for each matrix of the layer its result and one
    more value of the same size (normalized, rotated, activated); of experts those that a token uses. Then a mask of
    ``batch * context``, the logits of one token, and 32 MiB for the matrix products themselves. It holds for attention
    that keeps no scores (as FlashAttention does; plain attention keeps ``heads * batch * context`` more of them), and
    where matrices are multiplied as they lie in memory, without a decoded copy.
    """
    if isinstance(model, ModelShape):
        layers: list[_Shapes] = [model.layer_shapes]
        other, used = model.other_shapes, None
    else:
        layers = [{info.name: info.shape for info in layer} for layer in model.layers.values()]
        other = {name.removesuffix(".weight"): info.shape for name, info in model.tensors.items() if info.layer is None}
        used = ArchitectureMetadata(model.metadata).number("expert_used_count")
    results = max((sum(_results(layer.items(), used)) for layer in layers), default=0)
    embedding = other.get("token_embd") or (0,)
    width, logits = embedding[-1], (other.get("output") or embedding)[0]
    return _FLOAT32 * (batch * (2 * width + 2 * results + context) + logits) + _MATMUL


def _results(tensors: Iterable[tuple[str, tuple[int, ...]]], used: int | None) -> Iterable[int]:
    """The numbers that each matrix gives for one token."""
    for name, shape in tensors:
        if len(shape) < 2:  # noqa: PLR2004 - a matrix's dimensions
            continue
        experts = shape[0] if "_exps" in name and len(shape) > 2 else 0  # noqa: PLR2004 - one dimension more
        if used and used <= experts:
            yield used * math.prod(shape[1:-1])
        else:
            yield math.prod(shape[:-1])
