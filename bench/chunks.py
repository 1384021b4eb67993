"""Chunked copies against one copy of the same bytes, staging memory to device, on one stream.

The limit is the one copy; what is left of it at each chunk size is what cutting a load into chunks costs.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

from asyncload.device import Device, DeviceMemory, StagingMemory, Stream, default_device, open_device
from asyncload.options import format_size
from bench._common import make_parser, print_table, write_record

_MIB = 1 << 20


def copy(stream: Stream, target: DeviceMemory, staging: StagingMemory, chunk: int, passes: int = 1) -> float:
    """Copies all of the staging memory in chunks, ``passes`` times, and returns the seconds that took."""
    begin = time.perf_counter()
    for _ in range(passes):
        for offset in range(0, staging.nbytes, chunk):
            stream.upload(target, offset, staging, offset, min(chunk, staging.nbytes - offset))
    stream.record().synchronize()
    return time.perf_counter() - begin


def measure(device: Device, nbytes: int, chunks: Sequence[int], repeats: int) -> list[dict[str, float]]:
    """GB/s at each chunk size, the whole first; sizes take turns, so that a noisy moment hits all of them."""
    device.attach()
    staging, target, stream = device.staging(nbytes), device.allocate(nbytes), device.stream()
    try:
        sizes = [nbytes, *chunks]
        copy(stream, target, staging, nbytes)  # touches the target
        seconds: dict[int, list[float]] = {size: [] for size in sizes}
        for _ in range(repeats):
            for size in sizes:
                seconds[size].append(copy(stream, target, staging, size))
        # a chunk size is compared with the one copy of its own round
        return [
            {
                "chunk_bytes": size,
                "bytes_per_second": nbytes / statistics.median(seconds[size]),
                "of_one_copy": statistics.median(
                    one / chunked for one, chunked in zip(seconds[nbytes], seconds[size], strict=True)
                ),
            }
            for size in sizes
        ]
    finally:
        stream.close()
        device.free(target)
        staging.close()


def main(argv: Sequence[str] | None = None) -> int:
    arguments = make_parser(__doc__ or "", loads=False).parse_args(argv)
    nbytes = 4 * _MIB if arguments.quick else 256 * _MIB
    chunks = [size * _MIB for size in ((1, 2) if arguments.quick else (1, 2, 4, 8, 16, 32, 64))]
    device = open_device(arguments.device or default_device())
    try:
        results = measure(device, nbytes, chunks, repeats=3 if arguments.quick else 15)
        print_table(
            f"{format_size(nbytes)} from staging memory to {device.info.name}, one stream",
            [
                ("chunk", "GB/s", "of one copy"),
                *(
                    (
                        format_size(row["chunk_bytes"]),
                        f"{row['bytes_per_second'] / 1e9:.2f}",
                        f"{row['of_one_copy']:.3f}",
                    )
                    for row in results
                ),
            ],
        )
        write_record(arguments.json, "chunks", {"device": asdict(device.info), "rows": results})
    finally:
        device.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
