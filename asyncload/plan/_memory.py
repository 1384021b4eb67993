"""How a model and what it works with share a device's memory."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from asyncload.errors import DoesNotFitError, OptionsError
from asyncload.gguf import GGMLType, Header
from asyncload.options import DeviceKind, Options, format_size
from asyncload.plan._fit import fit, least
from asyncload.plan._load import PACKED, DtypeSpec, LoadPlan
from asyncload.plan._needs import MODES, Mode, Needs, Request, count_needs
from asyncload.plan._shape import ModelShape
from asyncload.plan._suggest import suggest
from asyncload.plan._tensor import Decode, TensorPlan
from asyncload.plan._weights import LayerPlan, PrefillDtype
from asyncload.quant import DType

__all__ = ["Placement", "Plan", "plan_memory"]


class Placement(StrEnum):
    """Where a tensor is: always on the device, there with its layer, or in a slot while its layer computes."""

    ALWAYS = "always"
    RESIDENT = "resident"
    STREAMED = "streamed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a model and what it works with share a device's memory; sizes in bytes.

    ``mode`` is ``"full"`` (all layers stay), ``"hybrid"`` (those numbered in ``resident`` stay, those in ``streamed``
    pass through the slots) or ``"stream"`` (all pass). ``slots`` slots of ``slot_nbytes`` each hold any of the streamed
    layers as its entry in ``layers`` lays it out; ``always`` are the tensors that are no layer's.

    ``breakdown`` is by purpose, under the names of ``asyncload.memory.Purpose``; ``prefill_nbytes`` of its weights are
    the cache for prefill. ``margin`` of the ``free`` bytes is left alone. ``kv_exact`` is False where the cache is an
    upper bound. ``staging`` is host memory and not in the sum. A ``ModelShape``'s plan has no tensors.
    """

    mode: Mode
    always: LoadPlan
    layers: Mapping[int, LayerPlan]
    resident: tuple[int, ...]
    streamed: tuple[int, ...]
    slots: int
    slot_nbytes: int
    breakdown: Mapping[str, int]
    prefill_nbytes: int
    free: int
    margin: int
    context: int
    kv_exact: bool
    staging: int

    @property
    def total(self) -> int:
        """All that is taken of the device."""
        return sum(self.breakdown.values())

    @property
    def available(self) -> int:
        """What may be taken: what is free, less the margin."""
        return self.free - self.margin

    @property
    def load(self) -> LoadPlan:
        """The tensors that are loaded once, in file order: those that are no layer's and those of layers that stay."""
        tensors = [*self.always.tensors]
        for number in self.resident:
            tensors += self.layers[number].load.tensors
        return LoadPlan(tuple(sorted(tensors, key=_in_file)), self.always.chunk_size)

    @property
    def sweep_nbytes(self) -> int:
        """Bytes that cross the bus each time that all layers are computed."""
        return sum(self.layers[number].upload_nbytes for number in self.streamed)

    def kernels(self, decode: Decode) -> set[tuple[GGMLType, DType]]:
        """The pairs of type and dtype that are decoded at one of the places, in the load or in sweeps."""
        plans = (self.always, *(layer.load for layer in self.layers.values()))
        return {pair for plan in plans for pair in plan.kernels(decode)}

    @property
    def tensors(self) -> tuple[tuple[TensorPlan, Placement], ...]:
        """Every tensor in file order, and where it is."""
        placed = [(tensor, Placement.ALWAYS) for tensor in self.always.tensors]
        resident = frozenset(self.resident)
        for number, layer in self.layers.items():
            place = Placement.RESIDENT if number in resident else Placement.STREAMED
            placed += ((tensor, place) for tensor in layer.load.tensors)
        return tuple(sorted(placed, key=lambda item: _in_file(item[0])))


def plan_memory(
    model: Header | ModelShape,
    *,
    free: int,
    dtype: DtypeSpec = PACKED,
    context: int | None = None,
    kv_type: str = "f16",
    kv_bytes: int | None = None,
    prefill_cache: PrefillDtype | None = None,
    batch: int = 512,
    workspace: int | None = None,
    slots: int = 2,
    allow: Collection[Mode] = MODES,
    margin: float = 0.1,
    device: DeviceKind = "cuda",
    options: Options | None = None,
) -> Plan:
    """Plans how a model runs in ``free`` bytes of a device: in the fastest of the modes in ``allow`` that fits.

    All layers stay (``"full"``), or as many as fit, spread evenly, while the others pass through ``slots`` slots
    (``"hybrid"``), or all pass (``"stream"``). The share ``margin`` of the free bytes is left alone.

    ``dtype``, ``device`` and ``options`` (``chunk_size``, ``streams``, ``staging``, ``decode``) are those of a load;
    where the device decodes, its scratch is counted in every mode. In a slot each tensor takes a multiple of 256 bytes.
    One that stays has an allocation of its own, as each slot has, and the scratch: for these CUDA takes whole
    blocks of 2 MiB where they are above 1 MiB.

    ``context`` is the tokens that the cache of keys and values holds, all sequences together (None: what the model was
    trained for, 4,096 at most; a ``ModelShape``'s ``sequence_length``), ``kv_type`` ``"f32"``, ``"f16"``, ``"bf16"``,
    ``"fp8"``, ``"q8_0"``, ``"q5_1"``, ``"q5_0"``, ``"q4_1"``, ``"q4_0"`` or ``"iq4_nl"``. ``kv_bytes`` sets the
    cache's size instead. ``prefill_cache`` adds copies in ``"fp8"`` or ``"fp16"`` of the matrices of the layers that
    stay. ``batch`` is the tokens that pass a layer at once, of which the workspace is counted (an upper bound:
    ``workspace_nbytes``) unless ``workspace`` sets it, in bytes.

    Raises ``DoesNotFitError`` where no mode fits, ``OptionsError`` for an option that cannot be meant, ``PlanError``
    for modes that a model's number of layers rules out and for a cache whose size nothing tells, and what
    ``plan_load`` raises.
    """
    if not 0 <= margin < 1:
        raise OptionsError(f"margin is {margin}, it must be a share of the free bytes", option="margin")
    if free < 0:
        raise OptionsError(f"free is {free}, it must be a number of bytes", option="free")
    request = Request(
        dtype=dtype,
        context=context,
        kv_type=kv_type,
        kv_bytes=kv_bytes,
        prefill_cache=prefill_cache,
        batch=batch,
        workspace=workspace,
        slots=slots,
        allow=allow,
        device=device,
        options=options or Options(),
    )
    needs = count_needs(model, request)
    reserve = math.ceil(free * margin)
    found = fit(needs, allow, slots, free - reserve)
    if found is None:
        raise _does_not_fit(model, request, needs, free, free - reserve)
    mode, resident = found
    layers, stays = needs.weights.layers, frozenset(resident)
    used = 0 if mode == "full" else slots
    return Plan(
        mode=mode,
        always=needs.weights.always,
        layers=layers,
        resident=resident,
        streamed=tuple(number for number in layers if number not in stays),
        slots=used,
        slot_nbytes=needs.slot_nbytes(stays),
        breakdown=MappingProxyType(needs.breakdown(resident, used)),
        prefill_nbytes=sum(layers[number].prefill_nbytes for number in resident),
        free=free,
        margin=reserve,
        context=needs.context,
        kv_exact=needs.kv.exact,
        staging=request.options.suited_to(device).staging,
    )


def _does_not_fit(
    model: Header | ModelShape, request: Request, needs: Needs, free: int, available: int
) -> DoesNotFitError:
    mode, breakdown = least(needs, request.allow, request.slots)
    needed = sum(breakdown.values())
    parts = ", ".join(f"{name} {format_size(size)}" for name, size in breakdown.items() if size)
    return DoesNotFitError(
        f"{format_size(needed)} needed (mode {mode}: {parts}), {format_size(available)} available of "
        f"{format_size(free)} free",
        needed=needed,
        available=available,
        breakdown=breakdown,
        suggestions=suggest(model, request, needs, available),
        kv_exact=needs.kv.exact,
    )


def _in_file(tensor: TensorPlan) -> tuple[int, int]:
    return tensor.info.part, tensor.info.offset
