"""What a load will do, decided from the header before a byte moves; pure.

``plan_load`` answers with a ``LoadPlan``: which tensors, as which dtype, decoded where, and how many bytes that takes.
Its ``chunks`` are the pieces of work for the pipeline, in file order, made as they are asked for.
"""

from __future__ import annotations

from asyncload.plan._chunks import Chunk, Segment
from asyncload.plan._load import DtypeSpec, LoadPlan, all_kernels, plan_load
from asyncload.plan._select import Selection, select_tensors
from asyncload.plan._tensor import Decode, TensorPlan

__all__ = [
    "Chunk",
    "Decode",
    "DtypeSpec",
    "LoadPlan",
    "Segment",
    "Selection",
    "TensorPlan",
    "all_kernels",
    "plan_load",
    "select_tensors",
]
