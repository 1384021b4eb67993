"""What a model's weights take of a device: what is always there, and each layer as a slot holds it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import Final, Literal

from asyncload.errors import OptionsError
from asyncload.gguf import Header
from asyncload.options import DeviceKind, Options
from asyncload.plan._load import PACKED, DtypeSpec, LoadPlan, plan_load
from asyncload.plan._shape import ModelShape
from asyncload.plan._tensor import Decode, TensorPlan

__all__ = [
    "ALLOCATION_BLOCK",
    "SLOT_ALIGNMENT",
    "LayerPlan",
    "PrefillDtype",
    "Weights",
    "allocated_nbytes",
    "count_weights",
    "prefill_copy",
]

PrefillDtype = Literal["fp8", "fp16"]

# What cudaMalloc aligns to at least, so that kernels find a tensor in a slot as they find one in its own allocation.
SLOT_ALIGNMENT: Final = 256
# Bytes of the blocks in which CUDA takes memory for an allocation; those of up to half of one share them. On an H200
# (driver 580) 291 tensors of 7.426 GB took 7.665 GB, which is what this comes to.
ALLOCATION_BLOCK: Final = 2 << 20


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer as a slot holds it: the tensors of ``load``, each at its offset, a multiple of 256.

    ``nbytes`` is what that takes, and ``upload_nbytes`` crosses the bus for it. While it stays on the device instead,
    ``resident_nbytes`` is what its tensors take, each with an allocation of its own, and ``prefill_nbytes`` its share
    of a cache for prefill. A ``ModelShape``'s layer has no tensors.
    """

    number: int
    load: LoadPlan
    offsets: tuple[int, ...]
    nbytes: int
    upload_nbytes: int
    resident_nbytes: int
    prefill_nbytes: int = 0

    @property
    def placed(self) -> tuple[tuple[TensorPlan, int], ...]:
        """Each tensor with its offset."""
        return tuple(zip(self.load.tensors, self.offsets, strict=True))


@dataclass(frozen=True, slots=True)
class Weights:
    """A model's tensors that are no layer's, its layers by number, and the bytes of ``scratch`` on the ``device``."""

    device: DeviceKind
    always: LoadPlan
    always_nbytes: int
    layers: Mapping[int, LayerPlan]
    scratch: int = 0


def count_weights(
    model: Header | ModelShape,
    *,
    dtype: DtypeSpec,
    prefill: PrefillDtype | None,
    device: DeviceKind,
    options: Options,
) -> Weights:
    """Counts a model's weights as ``plan_load`` has them, with ``options`` that suit the device; raises what it raises.

    An embedding that is the output head, too, is one tensor and counted once.
    """
    if isinstance(model, ModelShape):
        if dtype != PACKED:
            raise OptionsError("a ModelShape's bytes_per_weight says what its weights take, no dtype", option="dtype")
        return _of_shape(model, prefill, device)
    plan = plan_load(model, dtype=dtype, chunk_size=options.chunk_size, decode=options.decode, device=device)
    always: list[TensorPlan] = []
    layers: dict[int, list[TensorPlan]] = {number: [] for number in model.layers}
    for tensor in plan.tensors:
        number = tensor.info.layer
        (always if number is None else layers[number]).append(tensor)
    return Weights(
        device=device,
        always=LoadPlan(tuple(always), plan.chunk_size),
        always_nbytes=allocated_nbytes(device, [tensor.nbytes for tensor in always]),
        layers=MappingProxyType(
            {
                number: _layer(number, LoadPlan(tuple(layers[number]), plan.chunk_size), prefill, device)
                for number in layers
            }
        ),
        scratch=allocated_nbytes(device, [options.scratch]) if plan.kernels(Decode.DEVICE) else 0,
    )


def prefill_copy(shape: tuple[int, ...], nbytes: int, prefill: PrefillDtype) -> int:
    """Bytes of a tensor's copy in a cache for prefill, given its row-major shape and the bytes that it takes itself.

    Only matrices have one. In fp8 it is a byte a weight and a float32 scale a row; in fp16 two bytes a weight, and none
    for what takes two bytes a weight anyway.
    """
    weights = math.prod(shape)
    if len(shape) < 2 or (prefill == "fp16" and nbytes == 2 * weights):  # noqa: PLR2004 - a matrix's dimensions
        return 0
    return _align(2 * weights if prefill == "fp16" else weights + 4 * math.prod(shape[:-1]))


def _layer(number: int, load: LoadPlan, prefill: PrefillDtype | None, device: DeviceKind) -> LayerPlan:
    *offsets, end = accumulate((_align(tensor.nbytes) for tensor in load.tensors), initial=0)
    copies = [prefill_copy(t.info.shape, t.nbytes, prefill) for t in load.tensors] if prefill else []
    resident = allocated_nbytes(device, [tensor.nbytes for tensor in load.tensors])
    return LayerPlan(number, load, tuple(offsets), end, load.upload_nbytes, resident, sum(copies))


def _of_shape(shape: ModelShape, prefill: PrefillDtype | None, device: DeviceKind) -> Weights:
    empty = LoadPlan((), 0)
    sizes = [math.ceil(math.prod(tensor) * shape.bytes_per_weight) for tensor in shape.layer_shapes.values()]
    tensors = zip(shape.layer_shapes.values(), sizes, strict=True)
    copies = [prefill_copy(tensor, size, prefill) for tensor, size in tensors] if prefill else []
    layer = empty, (), sum(map(_align, sizes)), sum(sizes), allocated_nbytes(device, sizes), sum(copies)
    others = [math.ceil(math.prod(tensor) * shape.bytes_per_weight) for tensor in shape.other_shapes.values()]
    return Weights(
        device=device,
        always=empty,
        always_nbytes=allocated_nbytes(device, others),
        layers=MappingProxyType({number: LayerPlan(number, *layer) for number in range(shape.layers)}),
    )


def allocated_nbytes(device: DeviceKind, sizes: Iterable[int]) -> int:
    """What allocations of these sizes take of a device."""
    largest = ALLOCATION_BLOCK // 2 if device == "cuda" else math.inf  # that does not take whole blocks
    return sum(_align(size, SLOT_ALIGNMENT if size <= largest else ALLOCATION_BLOCK) for size in sizes)


def _align(nbytes: int, alignment: int = SLOT_ALIGNMENT) -> int:
    return -(-nbytes // alignment) * alignment
