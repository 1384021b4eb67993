"""``asyncload plan``: what a load would do, before a byte moves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asyncload.cli._request import dtype_spec, read_for
from asyncload.cli.text import plain, table
from asyncload.options import DecodeOption, format_size

if TYPE_CHECKING:
    from asyncload.plan import LoadPlan, TensorPlan

__all__ = ["plan"]


def plan(
    file: str,
    *,
    device: str | None,
    dtypes: Sequence[tuple[str | None, str]],
    select: Sequence[str | int] | None,
    decode: DecodeOption | None,
    as_json: bool,
) -> None:
    """Prints what a load would do with each tensor.

    Raises what ``read_header``, ``parse_device`` and ``plan_load`` raise. The device need not be there. ``dtypes`` are
    pairs of a pattern, or None for the rest, and a dtype.
    """
    from asyncload.plan import Decode, plan_load

    header, device, kind, options = read_for(file, device, decode)
    made = plan_load(
        header,
        dtype=dtype_spec(dtypes),
        select=select,
        chunk_size=options.chunk_size,
        decode=options.decode,
        device=kind,
    )
    scratch = options.scratch if made.kernels(Decode.DEVICE) else 0
    shown = _Shown(file, device, options.decode, made, scratch)
    print(json.dumps(shown.as_dict(), indent=2, ensure_ascii=False) if as_json else shown.render())


@dataclass(frozen=True, slots=True)
class _Shown:
    """A plan, for people and for programs; ``scratch`` in bytes."""

    file: str
    device: str
    decode: DecodeOption
    plan: LoadPlan
    scratch: int

    @property
    def file_nbytes(self) -> int:
        """Bytes that the tensors take in the file."""
        return sum(tensor.info.nbytes for tensor in self.plan.tensors)

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values for JSON."""
        return {
            "file": plain(self.file),
            "device": self.device,
            "decode": self.decode,
            "bytes": {
                "file": self.file_nbytes,
                "bus": self.plan.upload_nbytes,
                "device": self.plan.device_nbytes,
                "scratch": self.scratch,
            },
            "tensors": [
                {
                    "name": plain(tensor.info.name),
                    "type": tensor.info.type.name,
                    "dtype": str(tensor.dtype),
                    "shape": tensor.shape,
                    "decode": str(tensor.decode),
                    "bytes": {"file": tensor.info.nbytes, "bus": tensor.upload_nbytes, "device": tensor.nbytes},
                }
                for tensor in self.plan.tensors
            ],
        }

    def render(self) -> str:
        """The plan as text: an overview, sums by what becomes of which type, then every tensor."""
        overview = [
            ("file", self.file),
            ("device", f"{self.device}, decode={self.decode}"),
            ("tensors", f"{len(self.plan.tensors):,}, {format_size(self.file_nbytes)} in the file"),
            ("bus", format_size(self.plan.upload_nbytes)),
            ("memory", f"{format_size(self.plan.device_nbytes)}, and {format_size(self.scratch)} of scratch meanwhile"),
        ]
        return "\n\n".join((table(overview, align="<<"), self._sums(), self._tensors()))

    def _sums(self) -> str:
        groups: dict[tuple[str, ...], list[TensorPlan]] = {}
        for tensor in self.plan.tensors:
            groups.setdefault((tensor.info.type.name, str(tensor.dtype), str(tensor.decode)), []).append(tensor)
        rows: list[tuple[object, ...]] = [("type", "dtype", "decode", "tensors", "file", "bus", "device")]
        rows += ((*key, len(tensors), *_sizes(tensors)) for key, tensors in sorted(groups.items()))
        return table(rows, align="<<<>>>>")

    def _tensors(self) -> str:
        rows: list[tuple[object, ...]] = [("tensor", "type", "dtype", "decode", "file", "bus", "device")]
        rows += (
            (tensor.info.name, tensor.info.type.name, tensor.dtype, tensor.decode, *_sizes([tensor]))
            for tensor in self.plan.tensors
        )
        return table(rows, align="<<<<>>>")


def _sizes(tensors: Sequence[TensorPlan]) -> tuple[str, str, str]:
    """Bytes in the file, over the bus and on the device."""
    return (
        f"{sum(tensor.info.nbytes for tensor in tensors):,}",
        f"{sum(tensor.upload_nbytes for tensor in tensors):,}",
        f"{sum(tensor.nbytes for tensor in tensors):,}",
    )
