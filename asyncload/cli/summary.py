"""What a load did, for people and for programs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asyncload.cli.text import plain, table
from asyncload.options import format_size
from asyncload.quant import native_dtype

if TYPE_CHECKING:
    from asyncload.model import Model
    from asyncload.pipeline import LoadStats

__all__ = ["Summary", "summarize"]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a load did: tensors and bytes on the device by what they are, and where the time went."""

    file: str
    device: str
    tensors: dict[str, int]
    nbytes: dict[str, int]
    stats: LoadStats

    def as_dict(self) -> dict[str, Any]:
        """The summary as plain values for JSON."""
        return {
            "file": plain(self.file),
            "device": self.device,
            "tensors": sum(self.tensors.values()),
            "types": {name: {"tensors": self.tensors[name], "bytes": self.nbytes[name]} for name in self.tensors},
            "bytes_read": self.stats.bytes_read,
            "bytes_uploaded": self.stats.bytes_uploaded,
            "seconds": self.stats.wall,
            "bytes_per_second": self.stats.rate,
            "retries": self.stats.retries,
            "stages": {
                name: {
                    "seconds": stage.seconds,
                    "bytes": stage.nbytes,
                    "workers": stage.workers,
                    "utilization": stage.utilization,
                }
                for name, stage in self.stats.stages.items()
            },
            "bottleneck": self.stats.bottleneck,
            "reading": plain(self.stats.reading),
        }

    def render(self) -> str:
        """The summary as text."""
        stats = self.stats
        overview = [
            ("file", self.file),
            ("tensors", f"{sum(self.tensors.values())} on {self.device}"),
            ("bytes", f"{format_size(stats.bytes_read)} read, {format_size(stats.bytes_uploaded)} uploaded"),
            ("seconds", f"{stats.wall:.3f}, {stats.rate / 1e9:.2f} GB/s"),
            ("bottleneck", stats.bottleneck),
            ("reading", stats.reading),
        ]
        types: list[tuple[object, ...]] = [("type", "tensors", "bytes on device")]
        types += ((name, count, f"{self.nbytes[name]:,}") for name, count in self.tensors.items())
        stages: list[tuple[object, ...]] = [("stage", "busy seconds", "workers", "busy share", "bytes")]
        stages += (
            (name, f"{stage.seconds:.3f}", stage.workers, f"{stage.utilization:.0%}", f"{stage.nbytes:,}")
            for name, stage in stats.stages.items()
        )
        return "\n\n".join(
            (
                table(overview, align="<<"),
                table(types, align="<>>"),
                table(stages, align="<>>>>"),
            )
        )


def summarize(file: str, model: Model) -> Summary:
    """Counts a loaded model's tensors and their bytes by what they are, what takes most bytes first."""
    tensors: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for tensor in model.values():
        as_stored = tensor.packed or tensor.dtype == native_dtype(tensor.type)
        name = tensor.type.name if as_stored else f"{tensor.type.name} as {tensor.dtype}"
        tensors[name] += 1
        nbytes[name] += tensor.nbytes
    ordered = [name for name, _ in nbytes.most_common()]
    return Summary(
        file=file,
        device=model.device.name,
        tensors={name: tensors[name] for name in ordered},
        nbytes={name: nbytes[name] for name in ordered},
        stats=model.stats,
    )
