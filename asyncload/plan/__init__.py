"""What a load will do, decided from the header before a byte moves; pure.

``plan_load`` answers with a ``LoadPlan``: which tensors, as which dtype, decoded where, and how many bytes that takes.
Its ``chunks`` are the pieces of work for the pipeline, in file order, made as they are asked for.

``plan_memory`` answers with a ``Plan``: which layers stay on a device and which pass through slots, so that the model,
its cache and its workspace fit.
"""

from __future__ import annotations

from asyncload.plan._chunks import Chunk, Piece, Segment, cut_tensor
from asyncload.plan._estimate import estimate_full, estimate_layer, estimate_prefill_cache, estimate_streaming
from asyncload.plan._kv_cache import KV_TYPES, KVCache, kv_cache
from asyncload.plan._load import DtypeSpec, LoadPlan, all_kernels, plan_load
from asyncload.plan._memory import Placement, Plan, plan_memory
from asyncload.plan._needs import Mode
from asyncload.plan._select import Selection, select_tensors
from asyncload.plan._shape import ModelShape
from asyncload.plan._suggest import Suggestion
from asyncload.plan._tensor import Decode, TensorPlan
from asyncload.plan._weights import ALLOCATION_BLOCK, SLOT_ALIGNMENT, LayerPlan, PrefillDtype
from asyncload.plan._workspace import workspace_nbytes

__all__ = [
    "ALLOCATION_BLOCK",
    "KV_TYPES",
    "SLOT_ALIGNMENT",
    "Chunk",
    "Decode",
    "DtypeSpec",
    "KVCache",
    "LayerPlan",
    "LoadPlan",
    "Mode",
    "ModelShape",
    "Piece",
    "Placement",
    "Plan",
    "PrefillDtype",
    "Segment",
    "Selection",
    "Suggestion",
    "TensorPlan",
    "all_kernels",
    "cut_tensor",
    "estimate_full",
    "estimate_layer",
    "estimate_prefill_cache",
    "estimate_streaming",
    "kv_cache",
    "plan_load",
    "plan_memory",
    "select_tensors",
    "workspace_nbytes",
]
