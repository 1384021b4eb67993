"""What would help where a model does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from asyncload.gguf import Header
from asyncload.options import format_size
from asyncload.plan._fit import least
from asyncload.plan._load import PACKED
from asyncload.plan._needs import MODES, Needs, Request, count_needs
from asyncload.plan._shape import ModelShape

__all__ = ["Suggestion", "suggest"]

_CONTEXT_STEP: Final = 256
_SMALL_BATCH: Final = 64

_Value = str | int | tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Suggestion:
    """One argument of ``plan_memory`` set otherwise: what is ``needed`` then, in bytes, and whether that ``fits``."""

    option: str
    value: _Value
    needed: int
    fits: bool

    def __str__(self) -> str:
        """The argument as it is written, and what that comes to."""
        return f"{self.option}={self.value!r} ({self.outcome})"

    @property
    def outcome(self) -> str:
        """Whether that fits, or how much is needed then."""
        return "fits" if self.fits else format_size(self.needed)


def suggest(model: Header | ModelShape, request: Request, needs: Needs, available: int) -> tuple[Suggestion, ...]:
    """Single changes that take less, those that suffice first, then by what is needed."""
    totals = [
        (option, value, _total(count_needs(model, changed), changed)) for option, value, changed in _changes(request)
    ]
    totals.append(("context", *_less_context(model, request, needs, available)))
    now = _total(needs, request)
    found = [Suggestion(option, value, total, total <= available) for option, value, total in totals if total < now]
    return tuple(sorted(found, key=lambda suggestion: (not suggestion.fits, suggestion.needed)))


def _total(needs: Needs, request: Request) -> int:
    return sum(least(needs, request.allow, request.slots)[1].values())


def _changes(request: Request) -> Iterator[tuple[str, _Value, Request]]:
    if request.dtype != PACKED:
        yield "dtype", PACKED, replace(request, dtype=PACKED)
    if request.kv_bytes is None:
        for kv_type in ("q8_0", "q4_0"):
            yield "kv_type", kv_type, replace(request, kv_type=kv_type)
    if request.prefill_cache is not None:
        yield "prefill_cache", None, replace(request, prefill_cache=None)
    if request.workspace is None and request.batch > _SMALL_BATCH:
        yield "batch", _SMALL_BATCH, replace(request, batch=_SMALL_BATCH)
    if request.slots > 1:
        yield "slots", 1, replace(request, slots=1)
    for mode in MODES:
        if mode not in request.allow:
            allow = tuple(name for name in MODES if name == mode or name in request.allow)
            yield "allow", allow, replace(request, allow=allow)


def _less_context(model: Header | ModelShape, request: Request, needs: Needs, available: int) -> tuple[int, int]:
    """The longest context that fits, else the shortest that is worth a suggestion, and what is needed with it."""

    def total(steps: int) -> int:
        return _total(needs.with_context(model, request, steps * _CONTEXT_STEP), request)

    low, high = 1, -(-needs.context // _CONTEXT_STEP)  # the answer lies between, the upper end excluded
    while high - low > 1:
        middle = (low + high) // 2
        if total(middle) <= available:
            low = middle
        else:
            high = middle
    return low * _CONTEXT_STEP, total(low)
