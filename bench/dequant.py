"""Decoding on the host, by type and dtype: against the machine's own limit of writing, gguf-py, and ggml's C.

Buffers are reused and lie outside the caches (except with ``--quick``); variants take turns, and medians are compared.
A byte counts when it is read from the blocks or written as a weight.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import libgguf
import numpy as np

from asyncload.gguf import GGMLType
from asyncload.quant import DType, decode, native_dtype, prepare
from bench._common import print_table, write_record
from bench._dequant_peers import Bytes, Job, ggml_decoder, gguf_decoder, writers

_TYPES = ("Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q5_K", "Q6_K", "BF16", "F16", "F32")
_DTYPES = (DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16)
_ALIGNMENT = 16384  # weights: whole blocks, cache lines and scratches of any type
_SLOW_SHARE = 16  # gguf-py is measured on this fraction of the weights


@dataclass(frozen=True, slots=True)
class Row:
    """One pair on some threads: billions of weights a second, and shares and multiples of what it is compared with."""

    type: str
    dtype: str
    threads: int
    gweights: float
    output_gbytes: float
    limit_gbytes: float
    of_limit: float
    over_gguf: float | None
    over_ggml: float | None


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints a table, and writes the record where that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="toy size: shows that it works, not how fast")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures with machine, date and commit")
    parser.add_argument("--types", nargs="+", metavar="TYPE", default=_TYPES, help=f"of {', '.join(_TYPES)}")
    parser.add_argument("--output", metavar="MIB", type=int, default=256, help="size of the decoded output")
    options = parser.parse_args(arguments)
    nbytes = (1 if options.quick else options.output) << 20
    rounds = 1 if options.quick else 7
    threads = sorted({1, len(os.sched_getaffinity(0))})

    target = np.zeros(nbytes, np.uint8)
    pairs = [(GGMLType[name], dtype) for name in options.types for dtype in _DTYPES]
    rows = [
        _measure(type_, dtype, count, target, rounds)
        for type_, dtype in pairs
        if native_dtype(type_) is not dtype  # a plain copy
        for count in threads
    ]
    heading = ("pair", "threads", "Gweights/s", "output GB/s", "limit GB/s", "bytes / limit", "x gguf-py", "x ggml")
    print_table(f"Decoding to {nbytes >> 20} MiB", [heading, *map(_cells, rows)])
    write_record(options.json, "dequant", [asdict(row) for row in rows])


def _measure(type_: GGMLType, dtype: DType, threads: int, target: Bytes, rounds: int) -> Row:
    """One row: all that is compared takes turns, the limit too, as a shared machine is never twice the same."""
    weights = target.nbytes // dtype.itemsize // threads // _ALIGNMENT * _ALIGNMENT
    source = _blocks(type_, weights * threads)
    prepare([(type_, dtype)])
    jobs: dict[str, Job] = {"ours": lambda part, out: decode(type_, dtype, part.data, out.data)}
    peers = {"gguf": gguf_decoder(type_), "ggml": ggml_decoder(type_, dtype)}
    jobs |= {name: peer for name, peer in peers.items() if peer is not None}
    jobs |= (limits := writers())

    def parts(name: str) -> list[tuple[Bytes, Bytes]]:
        share = max(_ALIGNMENT, weights // _SLOW_SHARE // _ALIGNMENT * _ALIGNMENT) if name == "gguf" else weights
        packed, decoded = type_.nbytes(share), share * dtype.itemsize
        return [
            (source[index * packed : (index + 1) * packed], target[index * decoded : (index + 1) * decoded])
            for index in range(threads)
        ]

    seconds = _turns(jobs, parts, threads, rounds)
    rates = {  # billions of weights a second
        name: sum(out.nbytes for _, out in parts(name)) / dtype.itemsize / taken / 1e9
        for name, taken in seconds.items()
    }
    ours, limit = rates["ours"], max(rates[name] for name in limits) * dtype.itemsize
    return Row(
        type=type_.name,
        dtype=str(dtype),
        threads=threads,
        gweights=ours,
        output_gbytes=ours * dtype.itemsize,
        limit_gbytes=limit,
        of_limit=ours * (type_.type_size / type_.block_size + dtype.itemsize) / limit,
        over_gguf=ours / rates["gguf"] if "gguf" in rates else None,
        over_ggml=ours / rates["ggml"] if "ggml" in rates else None,
    )


def _blocks(type_: GGMLType, weights: int) -> Bytes:
    """Blocks of normally distributed weights, as a quantizer makes them, repeated to the number wanted."""
    values = np.random.default_rng(0).standard_normal((64, 4096)).astype(np.float32)
    match type_:
        case GGMLType.F32:
            some: Any = values
        case GGMLType.F16:
            some = values.astype(np.float16)
        case GGMLType.BF16:
            some = (values.view(np.uint32) >> 16).astype(np.uint16)
        case _:
            some = libgguf.quantize_rows(values, int(type_))
    return np.resize(np.ascontiguousarray(some).reshape(-1).view(np.uint8), type_.nbytes(weights))


def _turns(
    jobs: dict[str, Job], parts: Callable[[str], list[tuple[Bytes, Bytes]]], threads: int, rounds: int
) -> dict[str, float]:
    """Median seconds of each job over its parts, a part a thread, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    with ThreadPoolExecutor(threads) as pool:
        for number in range(rounds + 1):
            for name, job in jobs.items():
                pieces = parts(name)
                begin = time.perf_counter()
                list(pool.map(job, *zip(*pieces, strict=True)))
                if number or rounds == 1:  # the first round fetches code and pages
                    seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def _cells(row: Row) -> tuple[str, ...]:
    def times(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    return (
        f"{row.type} -> {row.dtype}",
        str(row.threads),
        f"{row.gweights:.2f}",
        f"{row.output_gbytes:.1f}",
        f"{row.limit_gbytes:.1f}",
        f"{row.of_limit:.2f}",
        times(row.over_gguf),
        times(row.over_ggml),
    )


if __name__ == "__main__":
    main()
