"""How well reading, decoding and copying overlap: a load against the slower of its two halves alone.

The device is a host device whose bandwidth is set to the rate at which this machine decodes, so that both halves take
equally long and a load in which they do not overlap takes twice the time. "Decode alone" reads and decodes every chunk
with all threads and copies nothing; "copy alone" copies as many bytes through that device and decodes nothing. The
targets are the caller's and touched before, as fresh memory costs more than either half.

Chunks are of 32 MiB unless ``ASYNCLOAD_CHUNK_SIZE`` says otherwise. A copy takes its time and, like that of a GPU's
copy engine, none of the processor's: with ``--real-copies`` the processor copies, which on a machine of few cores
measures the cores and not the pipeline. The native engine's copies are always real; it has a stream for each thread,
and reads while it copies whatever the options.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from asyncload import Loader, Options
from asyncload.blocking import read_header
from asyncload.device._host import HostDevice
from asyncload.gguf import Header
from asyncload.plan import Chunk, Decode, LoadPlan, plan_load
from asyncload.quant import decode, prepare
from bench._common import make_parser, model_file, options_of, print_table, run_async, write_record
from bench.chunks import copy

_DTYPE = "bf16"
# Where all cores decode, what the pipeline itself takes of them counts, and it takes that for each chunk.
_CHUNK_SIZE = 32 << 20


def decode_alone(file: Path, plan: LoadPlan, options: Options) -> float:
    """Seconds to read and decode all chunks with the options' threads, in as many buffers as the loader has."""
    descriptor = os.open(file, os.O_RDONLY)
    buffers = deque(memoryview(bytearray(options.chunk_size)) for _ in range(options.buffers))

    def work(chunk: Chunk) -> None:
        buffer = buffers.popleft()  # the oldest, as in a pipeline: the one used last is being copied
        os.preadv(descriptor, [buffer[: chunk.nbytes]], chunk.offset)
        for segment in chunk.segments:
            tensor = plan.tensors[segment.tensor]
            packed = buffer[segment.source_offset : segment.source_offset + segment.source_nbytes]
            decoded = buffer[segment.upload_offset : segment.upload_offset + segment.target_nbytes]
            decode(tensor.info.type, tensor.dtype, packed, decoded)
        buffers.append(buffer)

    try:
        with ThreadPoolExecutor(options.threads) as threads:
            begin = time.perf_counter()
            for _ in threads.map(work, list(plan.chunks())):
                pass
            return time.perf_counter() - begin
    finally:
        os.close(descriptor)


def copy_alone(device: HostDevice, nbytes: int, options: Options) -> float:
    """Seconds to copy that many bytes through the device, chunk by chunk on one stream, over and over from staging."""
    device.attach()
    staging, stream = device.staging(options.staging), device.stream()
    target = device.allocate(options.staging)
    try:
        copy(stream, target, staging, options.chunk_size)  # touches the target
        rounds = -(-nbytes // options.staging)
        seconds = sum(copy(stream, target, staging, options.chunk_size) for _ in range(rounds))
        return seconds * nbytes / (rounds * options.staging)
    finally:
        stream.close()
        device.free(target)
        staging.close()


async def load(file: Path, device: HostDevice, options: Options, into: dict[str, NDArray[Any]]) -> float:
    """Seconds of one load on an entered, warmed loader."""
    async with Loader(device, options=options) as loader:
        seconds = 0.0
        for _ in range(2):  # the first one warms
            begin = time.perf_counter()
            model = await loader.load(file, dtype=_DTYPE, into=into)
            seconds = time.perf_counter() - begin
            model.close()
        return seconds


def targets(header: Header) -> dict[str, NDArray[Any]]:
    """Touched memory for every tensor as bfloat16."""
    import ml_dtypes

    return {name: np.ones(info.shape, ml_dtypes.bfloat16) for name, info in header.tensors.items()}


def measure(file: Path, rounds: int, options: Options, *, real_copies: bool) -> dict[str, Any]:
    """Both halves, and loads in several ways, in turns; the medians of all rounds."""
    # the host device moves its bytes with memmove, and nothing else here does
    with nullcontext() if real_copies else patch.object(ctypes, "memmove", _move_nothing):
        return {"real_copies": real_copies, **_measure(file, rounds, options)}


def _move_nothing(target: int, source: int, nbytes: int) -> int:
    del source, nbytes
    return target


def _measure(file: Path, rounds: int, options: Options) -> dict[str, Any]:
    options = replace(options, chunk_size=options.chunk_size or _CHUNK_SIZE).suited_to("host")
    ways = {"pipelined": options, "one thread": replace(options, threads=1)}
    if options.engine == "python":
        ways["one stream"] = replace(options, streams=1)
        ways["unpipelined"] = replace(options, threads=1, streams=1, depth=1, staging=2 * options.chunk_size)
    header = read_header(file)
    plan = plan_load(header, dtype=_DTYPE, chunk_size=options.chunk_size)
    prepare(plan.kernels(Decode.HOST))
    into = targets(header)
    decode_alone(file, plan, options)

    taken: dict[str, list[float]] = {name: [] for name in ("decode alone", "copy alone", *ways)}
    ratios: dict[str, list[float]] = {name: [] for name in taken}
    bandwidths: list[float] = []
    for _ in range(rounds):  # each with the rate of its own, as the machine may have others to serve
        seconds = {"decode alone": decode_alone(file, plan, options)}
        bandwidth = plan.device_nbytes / seconds["decode alone"]
        device = HostDevice(bandwidth=bandwidth)
        seconds["copy alone"] = copy_alone(device, plan.device_nbytes, options)
        device.close()
        slower = max(seconds.values())
        for name, way in ways.items():
            seconds[name] = run_async(partial(load, file, HostDevice(bandwidth=bandwidth), way, into))
        bandwidths.append(bandwidth)
        for name, value in seconds.items():
            taken[name].append(value)
            ratios[name].append(value / slower)
    return {
        "bandwidth": statistics.median(bandwidths),
        "device_bytes": plan.device_nbytes,
        "rows": [
            {"how": name, "seconds": statistics.median(taken[name]), "of_slower": statistics.median(ratios[name])}
            for name in taken
        ],
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--real-copies", action="store_true", help="let the processor copy the bytes")
    arguments = parser.parse_args(argv)
    options = options_of(arguments)
    real_copies = arguments.real_copies or options.engine == "native"
    with model_file(arguments) as file:
        results = measure(file, 1 if arguments.quick else 9, options, real_copies=real_copies)
    print_table(
        f"{file.name} as {_DTYPE}, {results['device_bytes'] / 1e9:.3f} GB, over a device of "
        f"{results['bandwidth'] / 1e9:.2f} GB/s, by the {options.engine} engine",
        [
            ("how", "seconds", "of the slower half alone"),
            *((row["how"], f"{row['seconds']:.4f}", f"{row['of_slower']:.3f}") for row in results["rows"]),
        ],
    )
    write_record(arguments.json, "overlap", results, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
