"""The native engine against the limit of the machine, the Python engine and other loaders, also while Python is busy.

The clock: from the call of ``load`` on an entered, warmed loader to its return; the file is in the page cache. The
loads take turns, and so does the limit; what came is compared with the file outside of the clock. All loaders read one
file, in which the header of GGUF and that of safetensors take turns. A line "spinning" stands beside the same loader's
idle one, of the same rounds. On a GPU the limit is the raw copy out of pinned memory. On the host it is bare ``pread``
by as many threads of the same niceness, in pieces as large as the loader's chunks, into memory that is mapped as the
loader's tensors are and that nobody has touched: each page is cleared on the way, as it is for a load.

Parts: ``loads`` (Q8_0, packed), ``spin`` (the same of a model four times as large, so that 5 ms of waiting for the
interpreter lock do not decide), ``decode`` (Q4_K_M to bfloat16 on the device), ``ticker`` (a 1 ms ticker on the loop,
as in ``bench.latency``). What a loader that needs the lock for each tensor loses beside a busy thread goes by their
number: 707 in ``spin``'s Qwen3 32B, 292 in the 32 GB of ``--spin-preset llama-8b --spin-quant F32``.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from asyncload import Loader, Options
from asyncload.blocking import read_header
from asyncload.device import Device, default_device, open_device
from asyncload.options import DeviceKind, EngineOption
from asyncload.threads import lower_priority
from bench._common import make_parser, print_table, run_async, synthetic_file, write_record
from bench._engine_goals import (
    NATIVE,
    PYTHON,
    Goal,
    fastest,
    goals_of_decoding,
    goals_of_loads,
    goals_of_ticker,
)
from bench._load_check import Check, check_against_gguf
from bench._peers import missing, safetensors_loaders
from bench._race import Contestant, Line, Race, ours, theirs
from bench._two_headers import TwoHeaders
from bench.latency import late_rows
from bench.latency import measure as lateness
from bench.load import Way, copy_limit, measure_loads

_ALL_PARTS: Final = ("loads", "spin", "decode", "ticker")
_PARTS: Final[Mapping[DeviceKind, Sequence[str]]] = {"cuda": ("loads", "spin", "decode"), "host": ("loads", "ticker")}
_PRESETS: Final[Mapping[DeviceKind, str]] = {"cuda": "llama-8b", "host": "llama-1b"}
_PEERS: Final[Mapping[DeviceKind, Sequence[str]]] = {"cuda": ("instanttensor", "safetensors"), "host": ()}
_LIMITS: Final[Mapping[DeviceKind, str]] = {"cuda": "copy out of pinned memory", "host": "pread into untouched memory"}
_ENGINES: Final[Mapping[EngineOption, str]] = {"native": NATIVE, "python": PYTHON}
_VOCABULARY: Final = 1024  # makes room for the header of safetensors


def pread_limit(device: Device, file: TwoHeaders, options: Options) -> float:
    """Bytes a second of ``pread`` by the options' threads, chunk by chunk, into a host device's untouched memory."""
    tensors = list(file.header.tensors.values())
    targets = device.allocate_all([info.nbytes for info in tensors])
    descriptor = os.open(file.path, os.O_RDONLY)
    pieces = iter(
        [
            (memoryview(buffer)[begin : begin + options.chunk_size], info.offset + begin)
            for info, target in zip(tensors, targets, strict=True)
            for buffer in [(ctypes.c_char * info.nbytes).from_address(target.address)]
            for begin in range(0, info.nbytes, options.chunk_size)
        ]
    )

    def work(_: int) -> None:
        for view, offset in pieces:  # of all threads: who is ready takes the next
            done = 0
            while done < view.nbytes:
                done += os.preadv(descriptor, [view[done:]], offset + done)

    try:
        with ThreadPoolExecutor(options.threads, initializer=lower_priority, initargs=(options.nice,)) as threads:
            begin = time.perf_counter()
            list(threads.map(work, range(options.threads)))
            return file.header.nbytes / (time.perf_counter() - begin)
    finally:
        os.close(descriptor)
        for target in targets:
            device.free(target)


@dataclass(slots=True)
class Bench:
    """What is measured where, and what came of it."""

    arguments: argparse.Namespace
    device: Device
    peers: Sequence[str]
    native: Options = field(default_factory=lambda: replace(Options.from_env(), engine="native"))
    races: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    decoding: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    ticker: dict[str, Any] = field(default_factory=dict[str, Any])
    goals: list[Goal] = field(default_factory=list[Goal])
    not_measured: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def kind(self) -> DeviceKind:
        """That of the device."""
        return self.device.info.kind

    @property
    def repeats(self) -> int:
        """How often everything is measured."""
        return 1 if self.arguments.quick else self.arguments.repeats

    def measure(self, part: str) -> None:
        """Measures a part and prints what came of it."""
        preset = self.arguments.preset or _PRESETS[self.kind]
        idle, busy = (0,), (0, *self.arguments.spinning)
        few = busy[:2]  # beside more threads others take minutes
        if part == "loads":  # also what safetensors and the Python engine, being slow, do beside a thread that spins
            slow = few if "spin" in (self.arguments.parts or _PARTS[self.kind]) else idle
            self._load(preset, "Q8_0", {NATIVE: idle, PYTHON: slow, "instanttensor": idle, "safetensors": slow})
        elif part == "spin":
            preset, quant = self.arguments.spin_preset, self.arguments.spin_quant
            self._load(preset, quant, {NATIVE: busy, PYTHON: idle, "instanttensor": few})
        elif part == "decode":
            self._decode(preset)
        else:
            self._tick(preset)

    def _model(self, preset: str, quant: str) -> AbstractContextManager[Path]:
        """A synthetic model with room for the header of safetensors."""
        return synthetic_file("tiny" if self.arguments.quick else preset, quant, vocabulary=_VOCABULARY)

    def _load(self, preset: str, quant: str, beside: Mapping[str, Sequence[int]]) -> None:
        """Packed loads by asyncload and peers, by whose names ``beside`` has the numbers of threads that spin."""
        begin = time.perf_counter()
        with self._model(preset, quant) as path:
            file = TwoHeaders(path, read_header(path))
            file.sync()
            print(f"\n{path.name} written in {time.perf_counter() - begin:.1f} s", flush=True)
            race = run_async(partial(self._race, file, beside))
            self.races.append(
                {
                    "model": path.stem,
                    "bytes": file.header.nbytes,
                    "file_system": file.file_system,
                    "in_page_cache": file.cached(),
                    "limit": _LIMITS[self.kind],
                    "limits": race.limits,
                    "lines": [describe(line, race) for line in race.lines],
                }
            )
        self.goals += goals_of_loads(race, self.kind)
        print_race(self.races[-1], self.device.info.name)
        self.leave_out(race.failed)

    async def _race(self, file: TwoHeaders, beside: Mapping[str, Sequence[int]]) -> Race:
        name = self.device.info.name
        async with AsyncExitStack() as stack:
            entries: list[tuple[Contestant, int]] = []
            for engine, title in _ENGINES.items():
                loader = await stack.enter_async_context(Loader(name, options=replace(self.native, engine=engine)))
                entries += [(ours(title, loader, file), threads) for threads in beside[title]]
            for peer in self.peers:
                for title, load in safetensors_loaders(file.path, name, wanted=[peer]).items():
                    entries += [(theirs(title, load), threads) for threads in beside.get(peer, ())]
            if self.kind == "cuda":
                limit = partial(copy_limit, self.device, 3)
            else:
                limit = partial(pread_limit, self.device, file, self.native.suited_to(self.kind))
            race = Race(file, entries, self.repeats, self.arguments.patience, limit)
            await race.run()
            return race

    def leave_out(self, reasons: Mapping[str, str]) -> None:
        """Notes loaders that are not measured, and why."""
        self.not_measured |= reasons
        for loader, reason in reasons.items():
            print(f"{loader}: NOT MEASURED, {reason}", flush=True)

    def _decode(self, preset: str) -> None:
        """Loads that decode on the device, and packed ones beside them."""
        options = replace(self.native, decode="device")
        ways = {"packed": Way("packed", options), "bf16": Way("bf16", options)}
        with self._model(preset, "Q4_K_M") as path:
            packed, decoded = run_async(partial(measure_loads, path, self.device.info.name, ways, self.repeats))
            decoded.check = check_against_gguf(path, self.device.info.name, options)
        self.decoding = [asdict(row) | {"seconds": row.seconds} for row in (packed, decoded)]
        self.goals += goals_of_decoding(packed, decoded)
        cells = [(row["loader"], f"{row['seconds']:.4f}", contents(row), row["remark"]) for row in self.decoding]
        print_table("Q4_K_M, decoded on the device", [("as", "seconds", "contents", "remark"), *cells])

    def _tick(self, preset: str) -> None:
        """A ticker beside loads, by threads of the loop's priority and of a lower one."""
        ticks = 50 if self.arguments.quick else self.arguments.ticks
        with self._model(preset, "Q4_K_M") as path:
            for nice in (0, Options().nice):
                options = replace(self.native, nice=nice)
                run = partial(lateness, path, self.device.info.name, ticks, ["packed", "bf16"], options)
                _, self.ticker[str(nice)] = run_async(run)
                self.goals += goals_of_ticker(nice, self.ticker[str(nice)])
                title = f"lateness of a 1 ms ticker, in milliseconds, beside loads by threads of niceness {nice}"
                print_table(title, late_rows(self.ticker[str(nice)]))

    def results(self) -> dict[str, Any]:
        """All of it, for a record; at toy size nothing is judged."""
        return {
            "device": asdict(self.device.info),
            "races": self.races,
            "decoding": self.decoding,
            "ticker": self.ticker,
            "goals": [] if self.arguments.quick else [asdict(goal) for goal in self.goals],
            "not_measured": self.not_measured,
        }

    @property
    def all_right(self) -> bool:
        """Whether everything that was compared was the same."""
        rows = [row for race in self.races for row in race["lines"]] + self.decoding
        return not any(row["check"] and row["check"]["different"] for row in rows)


def describe(line: Line, race: Race) -> dict[str, Any]:
    """A line with its rate (bytes a second), as shares of the limit and of its own idle rate, and processor time."""
    idle = fastest(race.lines, line.loader, 0)
    return {
        **asdict(line),
        "seconds": line.seconds,
        "bytes_per_second": line.rate,
        "of_limit": line.rate / race.limit_rate,
        "of_idle": line.rate / idle.rate if idle and line.spinning else None,
        "processor_seconds_per_gb": statistics.median(line.processor) / line.nbytes * 1e9 if line.processor else None,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__ or "", loads=False)
    parser.add_argument("--parts", nargs="+", choices=_ALL_PARTS, help="(loads spin decode, on the host loads ticker)")
    parser.add_argument("--preset", help="of all parts but spin (llama-8b, on the host llama-1b)")
    parser.add_argument("--spin-preset", default="qwen3-32b", help="of spin (qwen3-32b: 35 GB of the page cache)")
    parser.add_argument("--spin-quant", default="Q8_0", help="of spin (Q8_0)")
    parser.add_argument("--spinning", nargs="*", type=int, default=[1, 4], metavar="N", help="threads that spin (1 4)")
    parser.add_argument("--peers", nargs="*", choices=_PEERS["cuda"], help="other loaders (all, on the host none)")
    parser.add_argument("--repeats", type=int, default=5, help="loads for each line (5)")
    parser.add_argument("--patience", type=float, default=15.0, help="seconds after which a line is not repeated (15)")
    parser.add_argument("--ticks", type=int, default=10_000, help="of the ticker, for each row (10000)")
    arguments = parser.parse_args(argv)
    device = open_device(arguments.device or default_device())
    try:
        wanted = _PEERS[device.info.kind] if arguments.peers is None else arguments.peers
        unready = missing(wanted, device.info.name)
        bench = Bench(arguments, device, [peer for peer in wanted if peer not in unready])
        bench.leave_out(unready)
        for part in arguments.parts or _PARTS[device.info.kind]:
            bench.measure(part)
            write_record(arguments.json, "engine", bench.results(), bench.native)  # what a later part may break
    finally:
        device.close()
    for goal in [] if arguments.quick else bench.goals:
        print(goal)
    return 0 if bench.all_right else 1


def print_race(race: dict[str, Any], device: str) -> None:
    """Prints the lines of a race."""
    limit = max(race["limits"]) / 1e9
    cached = "unknown" if race["in_page_cache"] is None else f"{race['in_page_cache']:.1%}"
    print_table(
        f"{race['model']}, packed, {race['bytes'] / 1e9:.3f} GB on {race['file_system']} ({cached} in the page cache), "
        f"to {device}; the limit ({race['limit']}) is {limit:.2f} GB/s",
        [
            ("loader", "spinning", "runs", "seconds", "GB/s", "of limit", "of idle", "processor s/GB", "contents"),
            *map(cells, race["lines"]),
        ],
    )


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A line of a race."""
    return (
        row["loader"],
        str(row["spinning"] or ""),
        str(len(row["runs"])),
        f"{row['seconds']:.4f}",
        f"{row['bytes_per_second'] / 1e9:.2f}",
        f"{row['of_limit']:.3f}",
        f"{row['of_idle']:.3f}" if row["of_idle"] is not None else "",
        f"{row['processor_seconds_per_gb']:.3f}" if row["processor_seconds_per_gb"] is not None else "",
        contents(row),
    )


def contents(row: dict[str, Any]) -> str:
    """What the check of a row found."""
    return str(Check(**row["check"])) if row["check"] else ""


if __name__ == "__main__":
    sys.exit(main())
