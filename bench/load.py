"""Loads, packed and as bfloat16, against the limit of the machine and against other loaders, in one run.

The clock: from the call of ``load`` on an entered, warmed loader to its return; the file is in the page cache. The
limit is the raw copy of the same bytes out of touched (on a GPU: pinned) staging memory into memory of the device that
is allocated and touched before; a loader to host memory reads, copies and touches fresh memory, so it stays well below.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio

from asyncload import Loader, Options, read_header
from asyncload.device import Device, default_device, open_device
from asyncload.gguf import Header
from asyncload.pipeline import LoadStats
from bench._common import make_parser, model_file, print_table, run_async, write_record
from bench._peers import peers
from bench.chunks import copy

_LIMIT_BYTES = 256 << 20
_LIMIT_CHUNK = 16 << 20


def copy_limit(device: Device, repeats: int, nbytes: int = _LIMIT_BYTES) -> float:
    """Bytes a second from staging memory to the device on one stream, the median of some copies."""
    device.attach()
    staging, target, stream = device.staging(nbytes), device.allocate(nbytes), device.stream()
    try:
        copy(stream, target, staging, _LIMIT_CHUNK)
        return nbytes / statistics.median(copy(stream, target, staging, _LIMIT_CHUNK) for _ in range(repeats))
    finally:
        stream.close()
        device.free(target)
        staging.close()


async def measure_loads(
    file: Path, device: str, options: Options, dtypes: Sequence[str], repeats: int
) -> tuple[Header, list[dict[str, Any]]]:
    """The median load as each dtype, each warmed by one load before, and the reading of the header alone."""
    rows: list[dict[str, Any]] = []
    async with Loader(device, options=options) as loader:
        for dtype in dtypes:
            runs: list[tuple[float, LoadStats, int]] = []
            for _ in range(repeats + 1):
                begin = time.perf_counter()
                model = await loader.load(file, dtype=dtype)
                seconds = time.perf_counter() - begin
                runs.append((seconds, model.stats, model.nbytes))
                model.close()
                await anyio.to_thread.run_sync(loader.tracker.flush)
            seconds, stats, nbytes = sorted(runs[1:], key=lambda run: run[0])[repeats // 2]
            rows.append(row(f"asyncload, {dtype}", seconds, nbytes, f"bottleneck: {stats.bottleneck}"))
    header = await read_header(file)
    begin = time.perf_counter()
    for _ in range(repeats):
        await read_header(file)
    rows.append(row("asyncload, header only", (time.perf_counter() - begin) / repeats, 0))
    return header, rows


def row(loader: str, seconds: float, nbytes: int, remark: str = "") -> dict[str, Any]:
    """One line of the result: what was loaded how, seconds, and bytes that are on the device then."""
    return {"loader": loader, "seconds": seconds, "device_bytes": nbytes, "remark": remark}


def measure(arguments: argparse.Namespace, file: Path, device: str) -> dict[str, Any]:
    """Everything, on one device: the limit, asyncload, the peers."""
    repeats = 1 if arguments.quick else 5
    opened = open_device(device)
    try:
        limit = copy_limit(opened, repeats, (4 << 20) if arguments.quick else _LIMIT_BYTES)
        info = opened.info
    finally:
        opened.close()
    header, rows = run_async(partial(measure_loads, file, device, Options.from_env(), arguments.dtype, repeats))
    with TemporaryDirectory(prefix="asyncload-peers-") as folder:
        for peer in peers(file, header, device, Path(folder)):
            seconds = statistics.median(peer.run() for _ in range(min(repeats, 3)))
            nbytes = 2 * sum(tensor.n_weights for tensor in header.tensors.values()) if peer.bf16 else header.nbytes
            rows.append(row(peer.name, seconds, nbytes, peer.remark))
    for line in rows:
        line["of_limit"] = line["device_bytes"] / line["seconds"] / limit
    return {"device": asdict(info), "file_bytes": header.nbytes, "limit_bytes_per_second": limit, "rows": rows}


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--dtype", nargs="+", default=["packed", "bf16"], help="what to load as (packed bf16)")
    arguments = parser.parse_args(argv)
    with model_file(arguments) as file:
        results = measure(arguments, file, arguments.device or default_device())
    limit = results["limit_bytes_per_second"]
    print_table(
        f"{file.name}, {results['file_bytes'] / 1e9:.3f} GB of tensors, to {results['device']['name']}",
        [
            ("loader", "seconds", "GB on device", "GB/s", "of limit", "remark"),
            ("limit: the copy alone", "", "", f"{limit / 1e9:.2f}", "1.00", ""),
            *(
                (
                    line["loader"],
                    f"{line['seconds']:.4f}",
                    f"{line['device_bytes'] / 1e9:.3f}",
                    f"{line['of_limit'] * limit / 1e9:.2f}",
                    f"{line['of_limit']:.2f}",
                    line["remark"],
                )
                for line in results["rows"]
            ),
        ],
    )
    write_record(arguments.json, "load", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
