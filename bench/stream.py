"""Layers streamed through slots: wall time of a pass against its lower bound, beside other ways to offload.

A pass multiplies a batch by the two matrices of each layer. Its lower bound, from the copy times T of all layers and
their compute times C, is max(sum(T) + C_last, T_first + sum(C)): nothing can be computed before the first layer is
there, and the last one's work follows the last copy. T is measured with pinned copies of the layers' bytes, C with
matrices that stay on the device, both in the same run. Batches are chosen for wanted ratios of C to T. Needs torch and
a CUDA device.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import anyio.to_thread

from asyncload.device import open_device
from asyncload.gguf import GGMLType
from asyncload.layers import PassStats, write_trace
from asyncload.loader import Loader
from asyncload.testing import encode_header, lay_out, random_blocks
from bench._common import make_parser, print_table, run_async, write_record
from bench._stream_peers import PEERS, Batch

_RATIOS: Final = (0.0, 0.5, 1.0, 2.0)
_UNEVEN: Final = (0.4, 1.6)  # of the even layers' width, in turn
_BF16: Final = 2  # bytes
_CALIBRATION: Final = 8192  # tokens
_SAMPLE: Final = 64  # matrices are made of that many repetitions of random bytes


@dataclass(frozen=True, slots=True)
class Shape:
    """``inner[i]`` is the width between the two matrices of layer i, ``width`` the one at their ends."""

    width: int
    inner: tuple[int, ...]

    @property
    def nbytes(self) -> list[int]:
        """What each layer takes in bfloat16."""
        return [2 * self.width * inner * _BF16 for inner in self.inner]


@dataclass(frozen=True, slots=True)
class Row:
    """A pass: ``wall`` seconds (median of ``runs``), its ``bound``, and memory in bytes.

    ``device_bytes`` of ours are the ledger's, those of peers the most that torch had at a time, activations included;
    ``host_bytes`` is what the process grew by.
    """

    loader: str
    layers: str
    ratio: float
    tokens: int
    copy: float
    compute: float
    bound: float
    wall: float
    of_bound: float
    runs: list[float]
    device_bytes: int
    host_bytes: int


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__ or "", device=False, loads=False)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--inner", type=int, default=12288)
    parser.add_argument("--passes", type=int, default=5, help="of which the median counts")
    parser.add_argument("--trace", metavar="FILE", type=Path, help="write a trace of our rows")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=[*PEERS])
    parser.add_argument("--shapes", nargs="+", choices=("even", "uneven"), default=["even", "uneven"])
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.layers, arguments.width, arguments.inner, arguments.passes = 6, 1024, 1280, 2
    even = Shape(arguments.width, (arguments.inner,) * arguments.layers)
    widths = [int(arguments.inner * share) // 256 * 256 for share in _UNEVEN]
    uneven = Shape(arguments.width, tuple(widths[number % 2] for number in range(arguments.layers)))
    rows: list[Row] = []
    trace: Path | None = arguments.trace
    passes: list[PassStats] | None = None if trace is None else []

    def add(measured: list[Row]) -> None:
        """Shows and writes what there is: what comes after may never end."""
        rows.extend(measured)
        for row in measured:
            print(f"{row.loader}, {row.layers}, C/T {row.ratio:g}: {row.wall:.4f} s, {row.of_bound:.3f}", flush=True)
        write_record(arguments.json, "stream", {"rows": [*map(asdict, rows)], "goals": _goals(rows)})

    with TemporaryDirectory(prefix="asyncload-bench-") as folder:
        for name, shape, slots in (("even", even, 2), ("uneven", uneven, 3)):
            if name not in arguments.shapes:
                continue
            race = Race(name, shape, slots, _points(shape), arguments.passes)
            for type_ in (GGMLType.BF16, GGMLType.Q4_K):
                path = write_model(Path(folder) / "model.gguf", shape, type_)
                add(run_async(partial(_stream, path, type_, race, passes)))
                path.unlink()
            for peer in arguments.peers:
                add(_peer(peer, race))
    heading = (
        "loader",
        "layers",
        "C/T",
        "tokens",
        "copy",
        "compute",
        "bound",
        "wall",
        "of bound",
        "device GB",
        "host GB",
    )
    print_table("Passes, in seconds", [heading, *map(_cells, rows)])
    for goal in _goals(rows):
        print(goal)
    if trace is not None and passes is not None:
        write_trace(trace, passes)
    return 0


# --- what is measured against ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Point:
    """A batch for a ratio of compute to copy time, and these times by layer."""

    ratio: float
    batch: Batch
    copy: list[float]
    compute: list[float]

    @property
    def bound(self) -> float:
        """The lower bound of a pass."""
        return max(sum(self.copy) + self.compute[-1], self.copy[0] + sum(self.compute))


def _points(shape: Shape) -> list[Point]:
    copy = _copy_seconds(shape.nbytes)
    per_token = sum(_compute_seconds(shape, _CALIBRATION)) / _CALIBRATION
    points: list[Point] = []
    for ratio in _RATIOS:
        tokens = max(1, round(ratio * sum(copy) / per_token / 128) * 128)
        points.append(Point(ratio, Batch(tokens, shape.width), copy, _compute_seconds(shape, tokens)))
    return points


def _copy_seconds(sizes: Sequence[int]) -> list[float]:
    """Seconds of each layer's copy from pinned memory, as shares of what all of them take without a pause."""
    device = open_device("cuda")
    staging, target, stream = device.staging(max(sizes)), device.allocate(max(sizes)), device.stream()
    try:
        taken: list[float] = []
        for _ in range(3):
            begin = time.perf_counter()
            for size in sizes:
                stream.upload(target, 0, staging, 0, size)
            stream.record().synchronize()
            taken.append(time.perf_counter() - begin)
    finally:
        stream.close()
        staging.close()
        device.free(target)
    return [min(taken) * size / sum(sizes) for size in sizes]


def _compute_seconds(shape: Shape, tokens: int) -> list[float]:
    """Seconds of each layer's work with matrices that stay, as shares of what all of it takes."""
    torch: Any = import_module("torch")
    batch = Batch(tokens, shape.width)
    matrices = {inner: batch.matrices(inner) for inner in set(shape.inner)}
    taken: list[float] = []
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for inner in shape.inner:
            batch.apply(*matrices[inner])
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    return [min(taken) * inner / sum(shape.inner) for inner in shape.inner]


# --- the contestants -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Race:
    """Layers of a shape, the slots that they need, what is computed with them, and how often."""

    name: str
    shape: Shape
    slots: int
    points: Sequence[Point]
    passes: int


async def _stream(path: Path, type_: GGMLType, race: Race, passes: list[PassStats] | None) -> list[Row]:
    """Also adds the last pass of each row to ``passes``, if they are asked for."""
    torch: Any = import_module("torch")
    rows: list[Row] = []
    before = _resident_bytes()
    label = f"asyncload, {type_.name}{' packed' if type_.quantized else ''}, {race.slots} slots"
    async with Loader("cuda") as loader:
        await loader.warm_up(["bf16"])
        async with loader.stream(
            path,
            dtype="bf16",
            slots=race.slots,
            allow=["stream"],
            host="slabs",
            trace=passes is not None,
            workspace=0,
            kv_bytes=0,
        ) as layers:
            host, stream = _resident_bytes() - before, torch.cuda.Stream()
            for point in race.points:
                runs: list[float] = []
                for _ in range(race.passes + 1):
                    begin = time.perf_counter()
                    async for layer in layers:
                        with torch.cuda.stream(stream), layer.on(stream):
                            up, down = (torch.from_dlpack(layer[f"{part}.weight"]) for part in ("up", "down"))
                            point.batch.apply(up, down)
                            del up, down
                    await anyio.to_thread.run_sync(stream.synchronize)
                    runs.append(time.perf_counter() - begin)
                rows.append(_row(label, race, point, runs[1:], device=loader.tracker.total, host=host))
                if passes is not None:
                    passes.append(await layers.last_pass())
    return rows


def _peer(peer: str, race: Race) -> list[Row]:
    torch: Any = import_module("torch")
    gc.collect()
    torch.cuda.empty_cache()
    before = _resident_bytes()
    rows: list[Row] = []
    try:
        forward = PEERS[peer](race.shape.width, race.shape.inner)
        host = _resident_bytes() - before
        for point in race.points:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            runs: list[float] = []
            for _ in range(race.passes + 1):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                forward(point.batch.x)
                torch.cuda.synchronize()
                runs.append(time.perf_counter() - begin)
            host = max(host, _resident_bytes() - before)
            rows.append(_row(peer, race, point, runs[1:], device=torch.cuda.max_memory_allocated() - held, host=host))
    except Exception as error:  # noqa: BLE001 - a peer that fails does not take the others' figures with it
        print(f"{peer}, {race.name}: NOT MEASURED: {type(error).__name__}: {error}", file=sys.stderr)
    gc.collect()
    return rows


def _row(loader: str, race: Race, point: Point, runs: list[float], **memory: int) -> Row:
    wall = statistics.median(runs)
    return Row(
        loader=loader,
        layers=race.name,
        ratio=point.ratio,
        tokens=point.batch.tokens,
        copy=sum(point.copy),
        compute=sum(point.compute),
        bound=point.bound,
        wall=wall,
        of_bound=wall / point.bound,
        runs=runs,
        device_bytes=memory["device"],
        host_bytes=memory["host"],
    )


def _goals(rows: Sequence[Row]) -> list[str]:
    """What was to be reached, and whether it was; of what is measured by now."""
    ours = [row for row in rows if row.loader.startswith("asyncload") and "packed" not in row.loader]
    if not ours:
        return []
    worst = max(row.of_bound for row in ours)
    goals = [f"bf16: a pass takes at most 1.03 of its bound: {worst:.3f}, {'met' if worst <= 1.03 else 'NOT met'}"]
    for layers in dict.fromkeys(row.layers for row in rows):
        unbound = [row for row in rows if (row.layers, row.ratio) == (layers, 0.0)]
        peers = [row.wall for row in unbound if not row.loader.startswith("asyncload")]
        packed = [row.wall for row in unbound if "packed" in row.loader]
        if peers and packed:
            times = min(peers) / packed[0]
            verdict = "met" if times >= 3 else "NOT met"
            goals.append(f"{layers}: Q4_K at least 3 times faster than the fastest peer: {times:.2f}, {verdict}")
    return goals


# --- models ----------------------------------------------------------------------------------------------------------


def write_model(path: Path, shape: Shape, type_: GGMLType) -> Path:
    """A file of the layers, of random content; what is in it does not matter to the copies."""
    tensors = [
        (f"blk.{layer}.{part}.weight", type_, size)
        for layer, inner in enumerate(shape.inner)
        for part, size in (("up", (inner, shape.width)), ("down", (shape.width, inner)))
    ]
    specs, _ = lay_out(tensors)
    content: dict[int, bytes] = {}
    with path.open("wb") as file:
        file.write(encode_header({"general.architecture": "llama"}, specs))
        for spec in specs:
            if spec.nbytes not in content:
                blocks = spec.nbytes // type_.type_size
                content[spec.nbytes] = random_blocks(type_, blocks // _SAMPLE, seed=spec.nbytes).tobytes() * _SAMPLE
            file.write(content[spec.nbytes])
    return path


def _resident_bytes() -> int:
    """Bytes of host memory that the process has."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) << 10


def _cells(row: Row) -> tuple[str, ...]:
    seconds = (row.copy, row.compute, row.bound, row.wall)
    return (
        row.loader,
        row.layers,
        f"{row.ratio:g}",
        str(row.tokens),
        *(f"{value:.4f}" for value in seconds),
        f"{row.of_bound:.3f}",
        f"{row.device_bytes / 1e9:.2f}",
        f"{row.host_bytes / 1e9:.1f}",
    )


if __name__ == "__main__":
    sys.exit(main())
