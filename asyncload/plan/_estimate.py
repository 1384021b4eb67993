"""Single figures about a model's size."""

from __future__ import annotations

from asyncload.gguf import Header
from asyncload.plan._fit import least
from asyncload.plan._load import PACKED, DtypeSpec
from asyncload.plan._needs import Request, count_needs
from asyncload.plan._shape import ModelShape
from asyncload.plan._weights import PrefillDtype

__all__ = ["estimate_full", "estimate_layer", "estimate_prefill_cache", "estimate_streaming"]


def estimate_full(
    model: Header | ModelShape, *, dtype: DtypeSpec = PACKED, context: int | None = None, kv_type: str = "f16"
) -> int:
    """The bytes that a model takes of a CUDA device with all its layers there: the total of a full ``Plan``.

    Raises what ``plan_memory`` raises, but for ``DoesNotFitError``.
    """
    needs = count_needs(model, Request(dtype=dtype, context=context, kv_type=kv_type))
    return sum(least(needs, ["full"], slots=0)[1].values())


def estimate_streaming(
    model: Header | ModelShape,
    *,
    dtype: DtypeSpec = PACKED,
    context: int | None = None,
    kv_type: str = "f16",
    slots: int = 2,
) -> int:
    """The bytes that a model takes of a CUDA device while all its layers stream: the total of a streaming ``Plan``.

    Raises what ``plan_memory`` raises, but for ``DoesNotFitError``; ``PlanError`` for a model without layers.
    """
    needs = count_needs(model, Request(dtype=dtype, context=context, kv_type=kv_type))
    return sum(least(needs, ["stream"], slots)[1].values())


def estimate_layer(model: Header | ModelShape, *, dtype: DtypeSpec = PACKED) -> int:
    """The bytes of a model's largest layer as a slot holds it; 0 for a model without layers."""
    return max(
        (layer.nbytes for layer in count_needs(model, Request(dtype=dtype, kv_bytes=0)).weights.layers.values()),
        default=0,
    )


def estimate_prefill_cache(
    model: Header | ModelShape, prefill_cache: PrefillDtype = "fp8", *, dtype: DtypeSpec = PACKED
) -> int:
    """The bytes of a cache for prefill over all layers: copies of their matrices in ``"fp8"`` or ``"fp16"``.

    In fp8 a byte a weight and a float32 scale a row; in fp16 two bytes a weight, and none for what has two anyway.
    """
    needs = count_needs(model, Request(dtype=dtype, kv_bytes=0, prefill_cache=prefill_cache))
    return sum(layer.prefill_nbytes for layer in needs.weights.layers.values())
