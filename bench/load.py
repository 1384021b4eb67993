"""Loads, packed and as bfloat16, against the limit of the machine and against other loaders, in one run.

The clock: from the call of ``load`` on an entered, warmed loader to its return; the file is in the page cache. The
loads take turns, so that a ratio of two of them holds however the machine is at the moment. The limit is the raw copy
of the file's bytes out of touched (on a GPU: pinned) staging memory into memory of the device that is allocated and
touched before; a loader to host memory reads, copies and touches fresh memory, so it stays well below.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, get_args

import anyio

from asyncload import Loader, Options, read_header
from asyncload.device import Device, default_device, open_device
from asyncload.gguf import Header
from asyncload.options import DecodeOption
from asyncload.pipeline import LoadStats
from asyncload.quant import DType
from bench._common import make_parser, model_file, options_of, print_table, run_async, write_record
from bench._load_check import Check, check_against_gguf, check_peer
from bench._peers import PEERS, TRANSFORMERS, missing, peers
from bench.chunks import copy

_LIMIT_BYTES: Final = 256 << 20
_LIMIT_CHUNK: Final = 16 << 20
_LIMIT_PASSES: Final = 16  # in so many waiting for the end does not count
_PACKED: Final = "packed"

# What is wanted on a GPU: decoding there costs next to nothing, and transformers takes many times as long.
_MOST_OF_PACKED: Final = 1.1
_LEAST_OF_TRANSFORMERS: Final = 200


@dataclass(frozen=True, slots=True)
class Way:
    """A way for asyncload to load a model."""

    dtype: str
    options: Options

    @property
    def decodes(self) -> bool:
        """Whether anything becomes numbers on the way."""
        return self.dtype != _PACKED


@dataclass(slots=True)
class Row:
    """One line of the result: what was loaded how, in seconds each time, and the bytes that are on the device then."""

    loader: str
    runs: Sequence[float]
    device_bytes: int
    remark: str = ""
    check: Check | None = None

    @property
    def seconds(self) -> float:
        """The median of the runs."""
        return statistics.median(self.runs)


def ways_to_load(dtypes: Sequence[str], places: Sequence[DecodeOption], options: Options) -> dict[str, Way]:
    """The ways by their names: each dtype, decoded in each of the places (without any, by the options)."""
    choices = [replace(options, decode=place) for place in places] or [options]
    ways = {f"asyncload, {dtype}": Way(dtype, choices[0]) for dtype in dtypes if dtype == _PACKED}
    for dtype in dtypes:
        if dtype != _PACKED:
            ways |= {f"asyncload, {dtype}, decode={choice.decode}": Way(dtype, choice) for choice in choices}
    return ways


def copy_limit(device: Device, repeats: int, nbytes: int = _LIMIT_BYTES) -> float:
    """Bytes a second from staging memory to the device on one stream, the median of some measurements."""
    device.attach()
    staging, target, stream = device.staging(nbytes), device.allocate(nbytes), device.stream()
    try:
        copy(stream, target, staging, _LIMIT_CHUNK)
        seconds = [copy(stream, target, staging, _LIMIT_CHUNK, _LIMIT_PASSES) for _ in range(repeats)]
        return _LIMIT_PASSES * nbytes / statistics.median(seconds)
    finally:
        stream.close()
        device.free(target)
        staging.close()


async def measure_loads(file: Path, device: str, ways: Mapping[str, Way], repeats: int) -> list[Row]:
    """Loads each way, in turns, after a first load that warms it."""
    runs: dict[str, list[float]] = {name: [] for name in ways}
    last: dict[str, tuple[int, LoadStats]] = {}
    async with AsyncExitStack() as stack:
        loaders = {
            options: await stack.enter_async_context(Loader(device, options=options))
            for options in {way.options for way in ways.values()}
        }
        for _ in range(repeats + 1):
            for name, way in ways.items():
                loader = loaders[way.options]
                begin = time.perf_counter()
                model = await loader.load(file, dtype=way.dtype)
                runs[name].append(time.perf_counter() - begin)
                last[name] = model.nbytes, model.stats
                model.close()
                await anyio.to_thread.run_sync(loader.tracker.flush)
    return [
        Row(
            name, runs[name][1:], nbytes, f"{stats.bytes_uploaded / 1e9:.3f} GB uploaded, bottleneck {stats.bottleneck}"
        )
        for name, (nbytes, stats) in last.items()
    ]


async def measure_header(file: Path, repeats: int) -> tuple[Header, Row]:
    """The header, and what reading it takes."""
    header = await read_header(file)
    runs: list[float] = []
    for _ in range(repeats):
        begin = time.perf_counter()
        await read_header(file)
        runs.append(time.perf_counter() - begin)
    return header, Row("asyncload, header only", runs, 0)


def measure_peers(
    arguments: argparse.Namespace, file: Path, header: Header, device: str, options: Options
) -> tuple[list[Row], dict[str, str]]:
    """The other loaders, and why some were not measured.

    Those that decode run once, and what they made is compared with what asyncload makes.
    """
    bf16_bytes = 2 * sum(tensor.n_weights for tensor in header.tensors.values())
    rows, unmeasured = list[Row](), missing(arguments.peers, device)
    with TemporaryDirectory(prefix="asyncload-peers-") as folder:
        for peer in peers(file, header, device, Path(folder), wanted=arguments.peers, share=arguments.peer_share):
            try:
                runs = [peer.run() for _ in range(1 if peer.bf16 or arguments.quick else 3)]
            except Exception as error:  # noqa: BLE001 - whatever a peer raises, the other figures stand
                unmeasured[peer.name] = f"{type(error).__name__}: {error}"
                continue
            rows.append(
                Row(
                    peer.name,
                    [run.seconds for run in runs],
                    bf16_bytes if peer.bf16 else header.nbytes,
                    runs[0].remark,
                    check_peer(runs[0].tensors, file, device, options) if runs[0].tensors else None,
                )
            )
            del runs  # before the next one needs the memory
    return rows, unmeasured


def measure(arguments: argparse.Namespace, file: Path, device: str) -> dict[str, Any]:
    """Everything, on one device: the limit, asyncload, the peers."""
    repeats = 1 if arguments.quick else 5
    opened = open_device(device)
    try:
        limit = copy_limit(opened, repeats, (4 << 20) if arguments.quick else _LIMIT_BYTES)
        info = opened.info
    finally:
        opened.close()
    ways = ways_to_load(arguments.dtype, arguments.decode, options_of(arguments))
    header, header_row = run_async(partial(measure_header, file, repeats))
    rows = run_async(partial(measure_loads, file, device, ways, repeats))
    for row in rows:
        way = ways[row.loader]
        if way.decodes and DType.parse(way.dtype) is DType.BFLOAT16:
            row.check = check_against_gguf(file, device, way.options)
    decoding = [name for name, way in ways.items() if way.decodes]
    options = ways[(decoding or list(ways))[0]].options
    peer_rows, unmeasured = measure_peers(arguments, file, header, device, options)
    rows += [header_row, *peer_rows]
    seconds = {row.loader: row.seconds for row in rows}
    packed, decoded = seconds.get(f"asyncload, {_PACKED}"), seconds[decoding[0]] if decoding else None
    return {
        "device": asdict(info),
        "file_bytes": header.nbytes,
        "limit_bytes_per_second": limit,
        "rows": [record(row, header.nbytes, limit, packed, decoded) for row in rows],
        "goals": goals(packed, decoded, seconds.get(TRANSFORMERS))
        if info.kind == "cuda" and not arguments.quick
        else [],
        "not_measured": unmeasured,
    }


def record(row: Row, file_bytes: int, limit: float, packed: float | None, decoded: float | None) -> dict[str, Any]:
    """A row with the file's bytes a second, their share of the limit, and the time as multiples of two others."""
    rate = file_bytes / row.seconds if row.device_bytes else 0.0
    return {
        **asdict(row),
        "seconds": row.seconds,
        "file_bytes_per_second": rate,
        "of_limit": rate / limit,
        "times_packed": packed and row.seconds / packed,
        "times_decoded": decoded and row.seconds / decoded,
    }


def goals(packed: float | None, decoded: float | None, transformers: float | None) -> list[dict[str, Any]]:
    """What is wanted of the seconds on a GPU, as far as they were measured, and whether it is so."""
    found: list[dict[str, Any]] = []
    if packed and decoded:
        times = decoded / packed
        text = f"decoding takes at most {_MOST_OF_PACKED} times what loading packed takes"
        found.append({"goal": text, "times": times, "met": times <= _MOST_OF_PACKED})
    if decoded and transformers:
        times = transformers / decoded
        text = f"transformers takes at least {_LEAST_OF_TRANSFORMERS} times as long"
        found.append({"goal": text, "times": times, "met": times >= _LEAST_OF_TRANSFORMERS})
    return found


def share(text: str) -> float:
    """Reads a share of a whole, above 0 and up to 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share: write a number above 0, up to 1")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--dtype", nargs="+", default=[_PACKED, "bf16"], help="what to load as (packed bf16)")
    parser.add_argument(
        "--decode",
        nargs="+",
        default=[],
        choices=get_args(DecodeOption),
        help="where to decode; others are compared with the first (default: ASYNCLOAD_DECODE, or auto)",
    )
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS), help="other loaders (all)")
    parser.add_argument(
        "--peer-share",
        type=share,
        default=1.0,
        metavar="SHARE",
        help="of the bytes that gguf-py decodes; its time is extrapolated (1: all of them)",
    )
    arguments = parser.parse_args(argv)
    with model_file(arguments) as file:
        results = measure(arguments, file, arguments.device or default_device())
    write_record(arguments.json, "load", results, options_of(arguments))
    report(file.name, results)
    return int(any(row["check"] and row["check"]["different"] for row in results["rows"]))


def report(name: str, results: dict[str, Any]) -> None:
    """Prints the results: what was not measured, the goals, the table."""
    for peer, reason in results["not_measured"].items():
        print(f"{peer}: NOT MEASURED, {reason}")
    for goal in results["goals"]:
        print(f"{'met' if goal['met'] else 'NOT met'} ({goal['times']:.3f}): {goal['goal']}")
    print_table(
        f"{name}, {results['file_bytes'] / 1e9:.3f} GB of tensors (GB/s are of these), to {results['device']['name']}",
        [
            ("loader", "seconds", "GB on device", "GB/s", "of limit", "x packed", "x decoded", "remark"),
            ("limit: the copy alone", "", "", f"{results['limit_bytes_per_second'] / 1e9:.2f}", "1.00", "", "", ""),
            *(
                (
                    row["loader"],
                    f"{row['seconds']:.4f}",
                    f"{row['device_bytes'] / 1e9:.3f}",
                    f"{row['file_bytes_per_second'] / 1e9:.2f}",
                    f"{row['of_limit']:.2f}",
                    f"{row['times_packed']:.2f}" if row["times_packed"] else "",
                    f"{row['times_decoded']:.2f}" if row["times_decoded"] else "",
                    remark(row),
                )
                for row in results["rows"]
            ),
        ],
    )


def remark(row: dict[str, Any]) -> str:
    """A row's remark, and what its check found."""
    check = [str(Check(**row["check"]))] if row["check"] else []
    return ", ".join(filter(None, [row["remark"], *check]))


if __name__ == "__main__":
    sys.exit(main())
