"""``asyncload stream``: passes over a model's layers, with no work on them, and what these took."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from asyncload.cli._request import dtype_spec, options_with
from asyncload.cli._run import run
from asyncload.cli.text import plain, table
from asyncload.errors import OptionsError
from asyncload.options import DecodeOption, Options, format_size

if TYPE_CHECKING:
    from asyncload.layers import LayerTiming, PassStats
    from asyncload.plan import Plan

__all__ = ["stream"]

_HOSTS: Final = {"slabs": "layers in pinned memory", "file": "layers are read in each pass"}


def stream(
    file: str,
    *,
    device: str | None,
    dtypes: Sequence[tuple[str | None, str]],
    decode: DecodeOption | None,
    host: Literal["auto", "slabs", "file"],
    free: int | None,
    settings: Mapping[str, Any],
    passes: int,
    layers: bool,
    trace: str | None,
    as_json: bool,
) -> None:
    """Passes a model's layers through their slots and prints what that took, ``layers`` of the last pass one by one.

    ``free`` in bytes; ``settings`` are further arguments of ``plan_memory``. Writes the trace to a file if asked to.
    Raises what ``Loader.stream`` and the iteration raise, and ``OptionsError`` for a trace that cannot be written.
    """
    from asyncload.layers import write_trace

    if trace is not None:
        with _writing(trace), Path(trace).open("a"):  # now, not after the passes
            pass
    request = {"dtype": dtype_spec(dtypes), "host": host, "free": free, "trace": trace is not None, **settings}
    shown = run(partial(_stream, file, device, options_with(decode), passes, request))
    if trace is not None:
        with _writing(trace):
            write_trace(trace, shown.passes)
    print(
        json.dumps(shown.as_dict(layers=layers), indent=2, ensure_ascii=False)
        if as_json
        else shown.render(layers=layers)
    )


async def _stream(file: str, device: str | None, options: Options, passes: int, request: Mapping[str, Any]) -> _Shown:
    from asyncload.layers import link_rate
    from asyncload.loader import Loader
    from asyncload.threads import run_in_thread

    async with Loader(device, options=options) as loader:
        link = await run_in_thread(link_rate, loader.device, loader.tracker)
        async with loader.stream(file, **request) as layers:
            work = await run_in_thread(loader.device.stream)
            try:
                taken: list[PassStats] = []
                for _ in range(passes):
                    async for layer in layers:
                        with layer.on(work):
                            pass
                    taken.append(await layers.last_pass())
            finally:
                await run_in_thread(work.close)
            return _Shown(file, loader.device.info.name, layers.plan, layers.host, link, taken)


@contextmanager
def _writing(trace: str) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise OptionsError(f"the trace cannot be written to {trace}: {error.strerror}", option="trace") from error


@dataclass(frozen=True, slots=True)
class _Shown:
    """Passes, for people and for programs; ``link`` in bytes a second."""

    file: str
    device: str
    plan: Plan
    host: Literal["slabs", "file"]
    link: float
    passes: Sequence[PassStats]

    def as_dict(self, *, layers: bool) -> dict[str, Any]:
        """The figures as plain values for JSON, times in seconds."""
        plan = self.plan
        return {
            "file": plain(self.file),
            "device": self.device,
            "mode": plan.mode,
            "layers": {"resident": plan.resident, "streamed": plan.streamed},
            "slots": {"count": plan.slots, "bytes_each": plan.slot_nbytes},
            "host": self.host,
            "link_bytes_per_second": self.link,
            "passes": [self._pass(stats, layers=layers) for stats in self.passes],
        }

    def _pass(self, stats: PassStats, *, layers: bool) -> dict[str, Any]:
        figures: dict[str, Any] = {
            "wall": stats.wall,
            "copy": stats.copy,
            "compute": stats.compute,
            "lower_bound": stats.lower_bound,
            "exposed_stall": stats.exposed_stall,
            "scheduling_stall": stats.scheduling_stall,
            "bytes": stats.nbytes,
            "bytes_per_second": stats.rate,
            "share_of_link": stats.share_of(self.link),
        }
        return figures | ({"layers": [asdict(timing) for timing in stats.layers]} if layers else {})

    def render(self, *, layers: bool) -> str:
        """The figures as text: an overview, the passes, and the last pass by layer."""
        plan = self.plan
        overview = [
            ("file", self.file),
            ("device", self.device),
            ("mode", plan.mode),
            ("layers", f"{len(plan.resident)} stay, {len(plan.streamed)} stream"),
            ("slots", f"{plan.slots} of {format_size(plan.slot_nbytes)}"),
            ("host", _HOSTS[self.host] if plan.streamed else "nothing"),
            ("bus", f"{format_size(plan.sweep_nbytes)} a pass; by itself it gives {self.link / 1e9:.2f} GB/s"),
        ]
        sections = [table(overview, align="<<"), self._passes()]
        if layers:
            sections.append(_layers(self.passes[-1].layers))
        return "\n\n".join(sections)

    def _passes(self) -> str:
        rows: list[tuple[object, ...]] = [
            ("pass", "wall s", "copy s", "compute s", "exposed stall", "scheduling stall s", "GB/s", "of the link")
        ]
        rows += (
            (
                number,
                *(f"{seconds:.6f}" for seconds in (stats.wall, stats.copy, stats.compute)),
                f"{stats.exposed_stall:.1%}",
                f"{stats.scheduling_stall:.6f}",
                f"{stats.rate / 1e9:.2f}",
                f"{stats.share_of(self.link):.1%}",
            )
            for number, stats in enumerate(self.passes)
        )
        return table(rows, align=">>>>>>>>")


def _layers(layers: Sequence[LayerTiming]) -> str:
    rows: list[tuple[object, ...]] = [("layer", "slot", "bytes", "copy s", "compute s", "waited s")]
    rows += (
        (
            timing.number,
            "stays" if timing.slot is None else timing.slot,
            f"{timing.nbytes:,}",
            *(f"{seconds:.6f}" for seconds in (timing.copy, timing.compute, timing.waited)),
        )
        for timing in layers
    )
    return table(rows, align=">>>>>>")
