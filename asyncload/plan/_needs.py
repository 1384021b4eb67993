"""What a model takes of a device, by purpose, whichever of its layers stay there."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

from asyncload.errors import OptionsError
from asyncload.gguf import Header
from asyncload.options import DeviceKind, Options
from asyncload.plan._kv_cache import KVCache, kv_cache
from asyncload.plan._load import PACKED, DtypeSpec
from asyncload.plan._metadata import ArchitectureMetadata
from asyncload.plan._shape import ModelShape
from asyncload.plan._weights import PrefillDtype, Weights, allocated_nbytes, count_weights
from asyncload.plan._workspace import workspace_nbytes

__all__ = ["MODES", "Mode", "Needs", "Request", "count_needs"]

Mode = Literal["full", "hybrid", "stream"]
MODES: Final[tuple[Mode, ...]] = ("full", "hybrid", "stream")  # the fastest first

_CONTEXT: Final = 4096
_LARGEST: Final = 1 << 40  # of any number that is asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a model is to do on a device; see ``plan_memory``. Raises ``OptionsError`` for what cannot be meant."""

    dtype: DtypeSpec = PACKED
    context: int | None = None
    kv_type: str = "f16"
    kv_bytes: int | None = None
    prefill_cache: PrefillDtype | None = None
    batch: int = 512
    workspace: int | None = None
    slots: int = 2
    allow: Collection[Mode] = MODES
    device: DeviceKind = "cuda"
    options: Options = field(default_factory=Options)

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name, least in (("context", 1), ("kv_bytes", 0), ("batch", 1), ("workspace", 0), ("slots", 1)):
            value = getattr(self, name)
            if value is not None and not least <= value <= _LARGEST:
                raise OptionsError(f"{name} is {value}, it must be {least} at least", option=name)
        if not self.allow or not set(self.allow) <= set(MODES):
            raise OptionsError(f"allow is {self.allow!r}: name one or more of {', '.join(MODES)}", option="allow")
        if self.prefill_cache not in (None, *get_args(PrefillDtype)):
            raise OptionsError(
                f"a cache for prefill is 'fp8' or 'fp16', not {self.prefill_cache!r}", option="prefill_cache"
            )


@dataclass(frozen=True, slots=True)
class Needs:
    """A model's weights, and what it takes beside them with a cache of ``context`` tokens; bytes."""

    weights: Weights
    context: int
    kv: KVCache
    workspace: int

    def slot_nbytes(self, resident: Collection[int]) -> int:
        """What a slot must hold: the largest layer that does not stay."""
        layers = self.weights.layers
        return max((layer.nbytes for number, layer in layers.items() if number not in resident), default=0)

    def breakdown(self, resident: Collection[int], slots: int) -> dict[str, int]:
        """Bytes by purpose, under the names of ``asyncload.memory.Purpose``, with these layers on the device."""
        kept = [self.weights.layers[number] for number in resident]
        return {
            "weights": self.weights.always_nbytes + sum(layer.resident_nbytes + layer.prefill_nbytes for layer in kept),
            "slots": allocated_nbytes(self.weights.device, [self.slot_nbytes(frozenset(resident))] * slots),
            "scratch": self.weights.scratch,
            "kv_cache": self.kv.nbytes,
            "workspace": self.workspace,
        }

    def with_context(self, model: Header | ModelShape, request: Request, context: int) -> Needs:
        """The same weights beside a cache of ``context`` tokens."""
        return _beside(self.weights, model, request, context)


def count_needs(model: Header | ModelShape, request: Request) -> Needs:
    """Counts a model; raises what ``plan_load`` and ``kv_cache`` raise."""
    weights = count_weights(
        model,
        dtype=request.dtype,
        prefill=request.prefill_cache,
        device=request.device,
        options=request.options.suited_to(request.device),
    )
    return _beside(weights, model, request, _default_context(model) if request.context is None else request.context)


def _beside(weights: Weights, model: Header | ModelShape, request: Request, context: int) -> Needs:
    batch = min(request.batch, context)
    if request.kv_bytes is None:
        kv = kv_cache(model, context=context, kv_type=request.kv_type, batch=batch)
    else:
        kv = KVCache(request.kv_bytes, exact=True)
    workspace = request.workspace
    if workspace is None:
        workspace = workspace_nbytes(model, context=context, batch=batch)
    return Needs(weights, context, kv, workspace)


def _default_context(model: Header | ModelShape) -> int:
    """What a shape says, and of a file's own length no more than is usual."""
    if isinstance(model, ModelShape):
        return model.sequence_length
    return min(ArchitectureMetadata(model.metadata).number("context_length") or _CONTEXT, _CONTEXT)
