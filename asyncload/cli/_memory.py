"""``asyncload plan --free``: how a model and what it works with would share a device's memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asyncload.cli._request import dtype_spec, read_for
from asyncload.cli.text import plain, table
from asyncload.options import DecodeOption, format_size

if TYPE_CHECKING:
    from asyncload.plan import Placement, Plan, TensorPlan

__all__ = ["show_memory"]


def show_memory(
    file: str,
    *,
    device: str | None,
    dtypes: Sequence[tuple[str | None, str]],
    decode: DecodeOption | None,
    free: int,
    settings: Mapping[str, Any],
    as_json: bool,
) -> None:
    """Prints a model's memory plan; raises what ``read_header``, ``parse_device`` and ``plan_memory`` raise.

    The device need not be there. ``free`` in bytes; ``settings`` are further arguments of ``plan_memory``.
    """
    from asyncload.plan import plan_memory

    header, device, kind, options = read_for(file, device, decode)
    made = plan_memory(header, free=free, dtype=dtype_spec(dtypes), device=kind, options=options, **settings)
    shown = _Shown(file, device, made)
    print(json.dumps(shown.as_dict(), indent=2, ensure_ascii=False) if as_json else shown.render())


@dataclass(frozen=True, slots=True)
class _Shown:
    """A memory plan, for people and for programs."""

    file: str
    device: str
    plan: Plan

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values for JSON."""
        plan = self.plan
        return {
            "file": plain(self.file),
            "device": self.device,
            "mode": plan.mode,
            "context": plan.context,
            "kv_exact": plan.kv_exact,
            "layers": {"resident": plan.resident, "streamed": plan.streamed},
            "slots": {"count": plan.slots, "bytes_each": plan.slot_nbytes},
            "bytes": {
                **plan.breakdown,
                "total": plan.total,
                "available": plan.available,
                "margin": plan.margin,
                "free": plan.free,
                "prefill_cache": plan.prefill_nbytes,
                "host_staging": plan.staging,
            },
            "bus": {"once": plan.load.upload_nbytes, "sweep": plan.sweep_nbytes},
            "tensors": [
                {
                    "name": plain(tensor.info.name),
                    "type": tensor.info.type.name,
                    "dtype": str(tensor.dtype),
                    "shape": tensor.shape,
                    "decode": str(tensor.decode),
                    "placement": str(placement),
                    "bytes": {"file": tensor.info.nbytes, "bus": tensor.upload_nbytes, "device": tensor.nbytes},
                }
                for tensor, placement in plan.tensors
            ],
        }

    def render(self) -> str:
        """The plan as text: an overview, the memory by purpose, sums by type and placement, then every tensor."""
        plan = self.plan
        overview = [
            ("file", self.file),
            ("device", f"{self.device}, {format_size(plan.free)} free"),
            ("mode", plan.mode),
            ("layers", f"{len(plan.resident)} stay, {len(plan.streamed)} stream"),
            ("resident", ", ".join(map(str, plan.resident)) or "none"),
            ("bus", f"{format_size(plan.load.upload_nbytes)} once, {format_size(plan.sweep_nbytes)} a sweep"),
            ("host", f"{format_size(plan.staging)} of staging"),
        ]
        return "\n\n".join((table(overview, align="<<"), self._purposes(), self._sums(), self._tensors()))

    def _purposes(self) -> str:
        plan = self.plan
        cache = f"{plan.context:,} tokens" + ("" if plan.kv_exact else ", an upper bound")
        weights = ["with what rounding up to blocks adds"] if self.device.startswith("cuda") else []
        if plan.prefill_nbytes:
            weights.append(f"{format_size(plan.prefill_nbytes)} of them copies for prefill")
        notes = {
            "weights": ", ".join(weights),
            "slots": f"{plan.slots} of {plan.slot_nbytes:,}" if plan.slots else "",
            "kv_cache": cache,
            "workspace": "an upper bound",
        }
        rows: list[tuple[object, ...]] = [("purpose", "bytes", "size", "")]
        rows += (
            (purpose, f"{size:,}", format_size(size), notes.get(purpose, ""))
            for purpose, size in plan.breakdown.items()
        )
        rows.append(("total", f"{plan.total:,}", format_size(plan.total), ""))
        rows.append(("available", f"{plan.available:,}", format_size(plan.available), "free, less the margin"))
        return table(rows, align="<>><")

    def _sums(self) -> str:
        groups: dict[tuple[str, str, Placement], list[TensorPlan]] = {}
        for tensor, placement in self.plan.tensors:
            groups.setdefault((tensor.info.type.name, str(tensor.dtype), placement), []).append(tensor)
        rows: list[tuple[object, ...]] = [("type", "dtype", "placement", "tensors", "bus", "device")]
        rows += ((*key, len(tensors), *_sizes(tensors)) for key, tensors in sorted(groups.items()))
        return table(rows, align="<<<>>>")

    def _tensors(self) -> str:
        rows: list[tuple[object, ...]] = [("tensor", "type", "dtype", "decode", "placement", "bus", "device")]
        rows += (
            (tensor.info.name, tensor.info.type.name, tensor.dtype, tensor.decode, placement, *_sizes([tensor]))
            for tensor, placement in self.plan.tensors
        )
        return table(rows, align="<<<<<>>")


def _sizes(tensors: Sequence[TensorPlan]) -> tuple[str, str]:
    """Bytes over the bus and on the device."""
    return (
        f"{sum(tensor.upload_nbytes for tensor in tensors):,}",
        f"{sum(tensor.nbytes for tensor in tensors):,}",
    )
