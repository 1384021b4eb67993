"""Decoding on a CUDA device, by type and dtype, against the device's own copying of memory, in one run.

Sources and targets lie in device memory and take turns, so that no cache holds them; times are those of the device's
events, and medians are compared. A byte counts when it is read from the blocks or written as a weight; in a copy it
counts twice.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np

from asyncload.gguf import GGMLType
from asyncload.quant import FAMILIES, DType
from asyncload.quant.cuda import can_decode, prepare
from asyncload.testing import random_blocks
from bench._common import print_table, write_record

_COPY: Final = 1 << 30  # bytes
_TURNS: Final = 3  # buffers that take turns
_ROUNDS: Final = 10
_SAMPLE: Final = 4096  # blocks that differ
_STEP: Final = 1 << 13  # weights: a multiple of all blocks
_GOALS: Final = {"floats": 0.8, "legacy": 0.8, "kquants": 0.8, "iquants": 0.6, "ternary": 0.6, "fp4": 0.6}


@dataclass(frozen=True, slots=True)
class Row:
    """One pair, and the weights a block of threads: median and extreme milliseconds, and rates in 1e9 a second."""

    type: str
    dtype: str
    registers: int
    span: int
    milliseconds: float
    fastest: float
    slowest: float
    gweights: float
    gbytes_in: float
    gbytes_out: float
    of_copy: float
    goal: float


@dataclass(frozen=True, slots=True)
class Setting:
    """What all pairs are measured with: kernels, targets of ``nbytes``, a copy's rate, rounds, spans to compare."""

    kernels: Any
    targets: Sequence[int]
    nbytes: int
    copy: float
    rounds: int
    spans: Sequence[int] | None


class Gpu:
    """The first device, and a stream whose work is timed by events."""

    def __init__(self) -> None:
        self.driver: Any = import_module("cuda.bindings.driver")
        core: Any = import_module("cuda.core")
        self.device = core.Device(0)
        self.device.set_current()
        self.stream = self.device.create_stream()
        self._timed = core.EventOptions(timing_enabled=True)

    def check(self, result: tuple[Any, ...]) -> Any:
        """The value of a driver call."""
        code, *values = result
        if int(code) != 0:
            raise RuntimeError(code.name)
        return values[0] if values else None

    def allocate(self, nbytes: int) -> int:
        """Device memory that is given back when the process ends."""
        return int(self.check(self.driver.cuMemAlloc(nbytes)))

    def fill(self, address: int, nbytes: int, some: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Fills memory with copies of some bytes."""
        written = min(some.nbytes, nbytes)
        self.check(self.driver.cuMemcpyHtoD(address, some.ctypes.data, written))
        while written < nbytes:
            piece = min(written, nbytes - written)
            self.check(self.driver.cuMemcpyDtoD(address + written, address, piece))
            written += piece
        self.check(self.driver.cuCtxSynchronize())

    def time(self, work: Callable[[int], None], rounds: int) -> list[float]:
        """Milliseconds of each round of ``work(round)``, after two that do not count."""
        marks: list[tuple[Any, Any]] = []
        for number in range(rounds + 2):
            begin = self.stream.record(options=self._timed)
            work(number)
            marks.append((begin, self.stream.record(options=self._timed)))
        self.stream.sync()
        return [float(end - begin) for begin, end in marks[2:]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints a table, and writes the record where that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="to float32 and float16 too, not only to bfloat16")
    parser.add_argument("--types", nargs="+", metavar="TYPE", default=[type_.name for type_ in FAMILIES])
    parser.add_argument("--output", metavar="MIB", type=int, default=512, help="size of a decoded output")
    parser.add_argument("--rounds", type=int, default=_ROUNDS, help="launches of which the median counts")
    parser.add_argument(
        "--spans", nargs="+", metavar="WEIGHTS", type=int, help="weights a block of threads, to compare"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures with machine, date and commit")
    options = parser.parse_args(arguments)
    dtypes = (DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32) if options.all else (DType.BFLOAT16,)
    wanted = [(GGMLType[name], dtype) for dtype in dtypes for name in options.types]
    pairs = [pair for pair in wanted if can_decode(*pair)]

    gpu = Gpu()
    arch = f"sm_{gpu.device.arch}"
    begin = time.perf_counter()
    kernels = prepare(arch, pairs)
    compiled = time.perf_counter() - begin
    print(f"{gpu.device.name}, {arch}: {len(pairs)} kernels, compiled or loaded in {compiled:.2f} s")

    nbytes = options.output << 20
    targets = [gpu.allocate(nbytes) for _ in range(_TURNS)]
    first = _copy(gpu, options.rounds)
    setting = Setting(kernels, targets, nbytes, first, options.rounds, options.spans)
    rows = [row for pair in pairs for row in _measure(gpu, pair, setting)]
    last = _copy(gpu, options.rounds)
    heading = (
        "pair",
        "registers",
        "span",
        "ms",
        "min",
        "max",
        "Gweights/s",
        "GB/s in",
        "GB/s out",
        "both",
        "of copy",
        "goal",
    )
    print_table(f"Decoding to {options.output} MiB; a copy moves {first:.0f} GB/s", [heading, *map(_cells, rows)])
    print(f"The copy again, at the end: {last:.0f} GB/s (read plus written).")
    missed = [f"{row.type} -> {row.dtype} ({row.of_copy:.2f})" for row in rows if row.of_copy < row.goal]
    print(f"Below their goal: {', '.join(missed) or 'none'}.")
    copies = {"first": first, "last": last}
    write_record(
        options.json, "dequant_cuda", {"device": gpu.device.name, "copy": copies, "rows": [*map(asdict, rows)]}
    )


def _copy(gpu: Gpu, rounds: int) -> float:
    """Bytes read plus bytes written of copies inside the device, in 1e9 a second."""
    buffers = [gpu.allocate(_COPY) for _ in range(2 * _TURNS)]
    noise = np.random.default_rng(0).integers(0, 256, 1 << 24, np.uint8)
    for address in buffers:
        gpu.fill(address, _COPY, noise)

    def copy(number: int) -> None:
        source, target = buffers[2 * (number % _TURNS)], buffers[2 * (number % _TURNS) + 1]
        gpu.check(gpu.driver.cuMemcpyDtoDAsync(target, source, _COPY, gpu.stream.handle))

    milliseconds = statistics.median(gpu.time(copy, rounds))
    for address in buffers:
        gpu.check(gpu.driver.cuMemFree(address))
    return 2 * _COPY / milliseconds / 1e6


def _measure(gpu: Gpu, pair: tuple[GGMLType, DType], setting: Setting) -> Generator[Row]:
    """One pair, a row for each span, over sources and targets that take turns."""
    type_, dtype = pair
    targets = setting.targets
    weights = setting.nbytes // dtype.itemsize // _STEP * _STEP
    count, packed = weights // type_.block_size, type_.nbytes(weights)
    sources = [gpu.allocate(packed) for _ in targets]
    for number, address in enumerate(sources):
        gpu.fill(address, packed, random_blocks(type_, _SAMPLE, seed=number).reshape(-1))
    kernel = setting.kernels[pair]
    turns = list(zip(sources, targets, strict=True))

    def decode(number: int) -> None:
        kernel.launch(gpu.stream, *turns[number % len(turns)], count)

    for span in setting.spans or [kernel.span]:
        kernel.span = span
        milliseconds = gpu.time(decode, setting.rounds)
        median = statistics.median(milliseconds)
        gbytes_in, gbytes_out = packed / median / 1e6, weights * dtype.itemsize / median / 1e6
        yield Row(
            type=type_.name,
            dtype=str(dtype),
            registers=kernel.registers,
            span=span,
            milliseconds=median,
            fastest=min(milliseconds),
            slowest=max(milliseconds),
            gweights=weights / median / 1e6,
            gbytes_in=gbytes_in,
            gbytes_out=gbytes_out,
            of_copy=(gbytes_in + gbytes_out) / setting.copy,
            goal=_GOALS[FAMILIES[type_]],
        )
    for address in sources:
        gpu.check(gpu.driver.cuMemFree(address))


def _cells(row: Row) -> tuple[str, ...]:
    return (
        f"{row.type} -> {row.dtype}",
        str(row.registers),
        str(row.span),
        f"{row.milliseconds:.3f}",
        f"{row.fastest:.3f}",
        f"{row.slowest:.3f}",
        f"{row.gweights:.0f}",
        f"{row.gbytes_in:.0f}",
        f"{row.gbytes_out:.0f}",
        f"{row.gbytes_in + row.gbytes_out:.0f}",
        f"{row.of_copy:.2f}",
        f"{row.goal:.1f}",
    )


if __name__ == "__main__":
    main()
