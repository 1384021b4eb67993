"""Decoding on the host: its speed by type and dtype, its start, and what an event loop notices of it.

Speed is held against the machine's own limit of writing, gguf-py, and ggml's C. Buffers are reused and lie outside the
caches (except with ``--quick``); variants take turns, and medians are compared. A byte counts when it is read from the
blocks or written as a weight. A call writes as much as a chunk of a load, whoever is called; with ``--call`` it writes
more. (The limit of calls that are larger than the caches is another one, as the C library writes these around them.)
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np

from asyncload.gguf import GGMLType
from asyncload.quant import FAMILIES, DType, decode, native_dtype, prepare
from bench._common import make_parser, print_table, write_record
from bench._dequant_loop import LATE_GOAL, measure_lateness
from bench._dequant_peers import Bytes, Job, ggml_decoder, gguf_decoder, make_blocks, writers
from bench._dequant_start import START_GOAL, measure_start

Share = list[tuple[Bytes, Bytes]]  # pieces of source and target

_DTYPES: Final = (DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16)
_ALIGNMENT: Final = 16384  # weights: whole blocks, cache lines and scratches of any type
_SLOW_SHARE: Final = 16  # gguf-py is measured on this fraction of the weights

# Goals: shares of the limit on one thread and on all, by type or family; multiples of gguf-py and of ggml.
_OF_LIMIT: Final = {"legacy": (0.90, 0.80), "kquants": (0.90, 0.80), "ternary": (0.80, 0.70), "fp4": (0.80, 0.70)}
_OF_LIMIT_IQ4: Final = (0.90, 0.80)
_OF_LIMIT_GRID: Final = {DType.FLOAT32: (0.80, 0.70), DType.FLOAT16: (0.45, 0.35), DType.BFLOAT16: (0.45, 0.35)}
_OF_LIMIT_PAIRS: Final = {(GGMLType.Q5_0, DType.BFLOAT16): (0.85, 0.75)}
_OVER_GGUF: Final = 10.0
_OVER_GGML: Final = {DType.FLOAT32: 1.0, DType.FLOAT16: 1.6, DType.BFLOAT16: 1.6}


@dataclass(frozen=True, slots=True)
class Row:
    """One pair on some threads: billions of weights a second, and shares and multiples of what it is compared with.

    ``missed`` has the goals that are not reached.
    """

    type: str
    dtype: str
    threads: int
    gweights: float
    output_gbytes: float
    limit_gbytes: float
    of_limit: float
    over_gguf: float | None
    over_ggml: float | None
    missed: list[str]


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__ or "", device=False, loads=False)
    parser.add_argument("--types", nargs="+", metavar="TYPE", default=[type_.name for type_ in FAMILIES])
    parser.add_argument("--dtypes", nargs="+", metavar="DTYPE", type=DType.parse, default=_DTYPES)
    parser.add_argument("--output", metavar="MIB", type=int, default=256, help="size of the decoded output")
    parser.add_argument("--call", metavar="MIB", type=int, default=4, help="most that one call writes")
    arguments = parser.parse_args(argv)
    nbytes = (1 if arguments.quick else arguments.output) << 20
    rounds = 1 if arguments.quick else 7
    threads = sorted({1, len(os.sched_getaffinity(0))})

    target = np.zeros(nbytes, np.uint8)
    pairs = [(GGMLType[name], dtype) for name in arguments.types for dtype in arguments.dtypes]
    rows = [
        _measure(type_, dtype, count, target, rounds=rounds, call=arguments.call << 20)
        for type_, dtype in pairs
        if native_dtype(type_) is not dtype  # a plain copy
        for count in threads
    ]
    heading = ("pair", "threads", "Gweights/s", "GB/s out", "limit", "bytes / limit", "x gguf-py", "x ggml", "missed")
    print_table(f"Decoding to {nbytes >> 20} MiB", [heading, *map(_cells, rows)])
    print(f"\n{sum(bool(row.missed) for row in rows)} of {len(rows)} rows miss a goal.")

    start = measure_start(1 if arguments.quick else 15)
    print_table(
        f"From the start of a process, in milliseconds; the goal is {START_GOAL} times Numba's own",
        [("until", "milliseconds"), *((what, f"{seconds * 1e3:.0f}") for what, seconds in start.items())],
    )
    late = measure_lateness(target, 50 if arguments.quick else 5000)
    print_table(
        f"Lateness of a 1 ms ticker while two threads decode, in milliseconds; the goal at p99 is {LATE_GOAL}",
        [tuple(late), tuple(f"{value:.2f}" for value in late.values())],
    )
    write_record(
        arguments.json,
        "dequant",
        {"call": arguments.call << 20, "rows": [*map(asdict, rows)], "start": start, "late": late},
    )
    return 0


def goal_of_limit(type_: GGMLType, dtype: DType) -> tuple[float, float] | None:
    """The shares of the limit that are to be reached on one thread and on all; None for plain floats."""
    if (type_, dtype) in _OF_LIMIT_PAIRS:
        return _OF_LIMIT_PAIRS[type_, dtype]
    if type_.name.startswith("IQ"):
        return _OF_LIMIT_IQ4 if type_.name.startswith("IQ4") else _OF_LIMIT_GRID[dtype]
    return _OF_LIMIT.get(FAMILIES[type_])


def _measure(type_: GGMLType, dtype: DType, threads: int, target: Bytes, *, rounds: int, call: int) -> Row:
    """One row: all that is compared takes turns, the limit too, as a shared machine is never twice the same."""
    weights = target.nbytes // dtype.itemsize // threads // _ALIGNMENT * _ALIGNMENT
    source = np.resize(make_blocks(type_), type_.nbytes(weights * threads))
    prepare([(type_, dtype)])
    jobs: dict[str, Job] = {"ours": lambda part, out: decode(type_, dtype, part.data, out.data)}
    peers = {"gguf": gguf_decoder(type_), "ggml": ggml_decoder(type_, dtype)}
    jobs |= {name: peer for name, peer in peers.items() if peer is not None}
    jobs |= (limits := writers())

    def share(name: str, thread: int) -> Share:
        """The pieces that a thread decodes."""
        wanted = max(_ALIGNMENT, weights // _SLOW_SHARE // _ALIGNMENT * _ALIGNMENT) if name == "gguf" else weights
        begin, step = thread * wanted, call // dtype.itemsize
        cuts = [(at, min(at + step, begin + wanted)) for at in range(begin, begin + wanted, step)]
        return [
            (source[type_.nbytes(at) : type_.nbytes(end)], target[at * dtype.itemsize : end * dtype.itemsize])
            for at, end in cuts
        ]

    shares = {name: [share(name, thread) for thread in range(threads)] for name in jobs}
    seconds = _turns(jobs, shares, rounds)
    rates = {  # billions of weights a second
        name: sum(out.nbytes for pieces in shares[name] for _, out in pieces) / dtype.itemsize / taken / 1e9
        for name, taken in seconds.items()
    }
    ours, limit = rates["ours"], max(rates[name] for name in limits) * dtype.itemsize
    of_limit = ours * (type_.type_size / type_.block_size + dtype.itemsize) / limit
    over_gguf, over_ggml = (ours / rates[peer] if peer in rates else None for peer in ("gguf", "ggml"))
    wanted = goal_of_limit(type_, dtype)
    goals = (
        ("of limit", of_limit, wanted and wanted[threads > 1]),
        ("x gguf-py", over_gguf, _OVER_GGUF),
        ("x ggml", over_ggml, _OVER_GGML[dtype]),
    )
    return Row(
        type=type_.name,
        dtype=str(dtype),
        threads=threads,
        gweights=ours,
        output_gbytes=ours * dtype.itemsize,
        limit_gbytes=limit,
        of_limit=of_limit,
        over_gguf=over_gguf,
        over_ggml=over_ggml,
        missed=[f"{goal:g} {what}" for what, reached, goal in goals if reached and goal and reached < goal],
    )


def _turns(jobs: dict[str, Job], shares: dict[str, list[Share]], rounds: int) -> dict[str, float]:
    """Median seconds of each job over its shares, a share a thread, in turns."""

    def work(job: Job, pieces: Share) -> None:
        for source, target in pieces:
            job(source, target)

    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    with ThreadPoolExecutor() as pool:
        for number in range(rounds + 1):
            for name, job in jobs.items():
                begin = time.perf_counter()
                list(pool.map(work, [job] * len(shares[name]), shares[name]))
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
        ", ".join(row.missed),
    )


if __name__ == "__main__":
    sys.exit(main())
