"""How late a 1 ms ticker on the same event loop is while models are loaded, again and again.

Lateness is what a sleep of 1 ms took beyond that. A loop that nobody holds is late by what the machine itself takes: an
idle one (the row "idle"), and one whose cores are as busy as loads to the host make them, by another process's bare
reads of the same file ("bare reads"). Every blocking call on the loop's thread, and every thread that keeps the
interpreter lock, adds to it. With ``--nice 0`` the loader's threads have the loop's priority, else they make way.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from asyncload import Loader, Options
from asyncload.device import DeviceInfo
from bench._common import make_parser, model_file, options_of, print_table, run_async, write_record

_PERIOD = 0.001


async def _idle() -> None:
    await anyio.sleep(0.1)


@contextmanager
def _bare_reads(file: Path, options: Options) -> Generator[None]:
    """Has another process read the file meanwhile, by as many threads of the same niceness."""
    command = [sys.executable, "-m", "bench._bare_reads", str(file), str(options.threads), str(options.nice)]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield
        finally:
            process.kill()


async def lateness(work: Callable[[], Awaitable[object]], ticks: int) -> list[float]:
    """Repeats the work until the ticker has ticked that often; returns all latenesses in seconds, sorted."""
    late: list[float] = []
    done = anyio.Event()

    async def tick() -> None:
        while not done.is_set():
            begin = time.perf_counter()
            await anyio.sleep(_PERIOD)
            late.append(time.perf_counter() - begin - _PERIOD)

    async with anyio.create_task_group() as group:
        group.start_soon(tick)
        while len(late) < ticks:
            await work()
        done.set()
    return sorted(late)


def percentiles(late: list[float]) -> dict[str, float]:
    """The figures that matter of sorted latenesses, in milliseconds."""
    at = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}
    values = {name: late[min(int(len(late) * share), len(late) - 1)] * 1e3 for name, share in at.items()}
    return values | {"max": late[-1] * 1e3}


async def measure(
    file: Path, device: str | None, ticks: int, dtypes: Sequence[str], options: Options
) -> tuple[DeviceInfo, dict[str, Any]]:
    """Latenesses of an idle loop, beside bare reads, then during loads as each of the dtypes."""
    results: dict[str, Any] = {}
    async with Loader(device, options=options) as loader:

        async def load(dtype: str) -> None:
            (await loader.load(file, dtype=dtype)).close()

        works: dict[str, Callable[[], Awaitable[object]]] = {"idle": _idle, "bare reads": _idle}
        for name, work in (works | {dtype: partial(load, dtype) for dtype in dtypes}).items():
            await work()  # warm: kernels are compiled, caches full
            with _bare_reads(file, loader._active().options) if name == "bare reads" else nullcontext():
                late = await lateness(work, ticks)
            results[name] = {"ticks": len(late), "milliseconds": percentiles(late)}
        return loader.device.info, results


def late_rows(results: dict[str, Any]) -> list[tuple[object, ...]]:
    """The results as a table."""
    return [
        ("load", "ticks", "p50", "p99", "p99.9", "max"),
        *(
            (name, row["ticks"], *(f"{value:.2f}" for value in row["milliseconds"].values()))
            for name, row in results.items()
        ),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--ticks", type=int, default=None, help="ticks for each row (default: 10000)")
    parser.add_argument("--nice", type=int, help="what the loader's threads add to their niceness (default: 10)")
    arguments = parser.parse_args(argv)
    options = options_of(arguments)
    ticks = arguments.ticks or (50 if arguments.quick else 10_000)
    with model_file(arguments) as file:
        info, results = run_async(partial(measure, file, arguments.device, ticks, ["packed", "bf16"], options))
    print_table(
        f"lateness of a 1 ms ticker, in milliseconds, while {file.name} is loaded to {info.name} by the "
        f"{options.engine} engine",
        late_rows(results),
    )
    write_record(arguments.json, "latency", {"device": asdict(info), "rows": results}, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
