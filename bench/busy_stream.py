"""A streaming sweep while Python threads spin: consumed in C++, and consumed in Python, each beside its own idle time.

The layers go through slots as in ``bench.stream``; the work on each is a kernel that takes a fixed time, so that only
who hands the layers out differs. Consumed in C++ no part of the sweep needs the interpreter. A Python consumer needs it
for each layer, and may have to wait for it. Needs a CUDA device and the native engine.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import anyio.to_thread

from asyncload import read_header
from asyncload.gguf import GGMLType
from asyncload.layers import NativeSlabFeed, Slabs
from asyncload.loader import LayerStream, Loader
from asyncload.memory import Purpose
from asyncload.plan import plan_memory
from asyncload.source import open_source
from asyncload.testing import SleepingKernel
from bench._common import make_parser, print_table, run_async, write_record
from bench._race import spinning
from bench.stream import Shape, write_model

_SPINNERS: Final = (0, 1, 4)  # a Python consumer would take minutes beside four
_RATIOS: Final = (0.0, 0.5, 1.0, 2.0)
_LARGEST: Final = 1.05  # of the idle wall, consumed in C++ beside one spinning thread
_SOURCE: Final = r"""
extern "C" __global__ void work(unsigned long long, unsigned long long, long long nanoseconds)
{
    long long begin, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
    do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); while (now - begin < nanoseconds);
}
"""


@dataclass(frozen=True, slots=True)
class Row:
    """``wall`` seconds a pass, the median of ``runs``, and that over the same without a spinning thread."""

    consumer: str
    ratio: float
    spinning: int
    runs: list[float]
    wall: float
    of_idle: float


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__ or "", device=False, loads=False)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--inner", type=int, default=12288)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--passes", type=int, default=3, help="of which the median counts")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.layers, arguments.width, arguments.inner, arguments.passes = 6, 1024, 1280, 2
    shape = Shape(arguments.width, (arguments.inner,) * arguments.layers)
    rows: list[Row] = []

    def add(row: Row) -> None:
        """Shows and writes what there is: what comes after may never end."""
        rows.append(row)
        print(
            f"{row.consumer}, C/T {row.ratio}, {row.spinning} spinning: {row.wall:.4f} s, {row.of_idle:.3f}", flush=True
        )
        write_record(arguments.json, "busy_stream", {"rows": [*map(asdict, rows)], "goals": _goals(rows)})

    with TemporaryDirectory(prefix="asyncload-bench-") as folder:
        for type_ in (GGMLType.BF16, GGMLType.Q4_K):
            path = write_model(Path(folder) / "model.gguf", shape, type_)
            run_async(partial(_Sweeps(type_.name, arguments.slots, arguments.passes, add).measure, path))
            path.unlink()
    heading = ("consumer", "C/T", "spinning", "seconds a pass", "of idle")
    cells = [(row.consumer, row.ratio, row.spinning, f"{row.wall:.4f}", f"{row.of_idle:.3f}") for row in rows]
    print_table("Passes while Python threads spin", [heading, *cells])
    for goal in _goals(rows):
        print(goal)
    return 0


def _goals(rows: Sequence[Row]) -> list[str]:
    """What was to be reached, and whether it was."""
    return [
        f"{row.consumer}, C/T {row.ratio}: {row.of_idle:.3f} of its idle wall, "
        f"{'at' if row.of_idle <= _LARGEST else 'NOT at'} most {_LARGEST}"
        for row in rows
        if row.spinning == 1 and row.consumer.endswith("C++")
    ]


@dataclass(frozen=True, slots=True)
class _Sweeps:
    """Passes of one model, called ``name``, and what becomes of each row."""

    name: str
    slots: int
    passes: int
    add: Callable[[Row], None]

    async def measure(self, path: Path) -> None:
        """Both consumers."""
        async with Loader("cuda") as loader:
            await loader.warm_up(["bf16"])
            copies = await self._consumed_in_cpp(loader, path)
            arguments: dict[str, Any] = {"allow": ["stream"], "host": "slabs", "workspace": 0, "kv_bytes": 0}
            async with loader.stream(path, dtype="bf16", slots=self.slots, **arguments) as layers:
                await self._consumed_in_python(layers, copies)

    async def _consumed_in_cpp(self, loader: Loader, path: Path) -> float:
        """Returns the seconds that a pass's copies take."""
        async with _open_feed(loader, path, self.slots) as (feed, addresses, n_layers):
            native: Any = import_module("asyncload_native")
            backend = loader._active().native
            assert backend is not None
            code, kernel = _compile(backend.device.info.index)

            async def sweep(nanoseconds: int) -> float:
                consume = partial(
                    native.consume,
                    feed,
                    backend.device.native(),
                    addresses,
                    passes=1,
                    kernel=kernel,
                    amount=nanoseconds,
                )
                return float(await anyio.to_thread.run_sync(consume))

            await sweep(1)
            copies = statistics.median([await sweep(1) for _ in range(self.passes)])
            for ratio in _RATIOS:
                consumed = partial(sweep, max(1, int(copies / n_layers * ratio * 1e9)))
                await self._beside_spinners("C++", ratio, consumed, _SPINNERS)
            del code
        return copies

    async def _consumed_in_python(self, layers: LayerStream, copies: float) -> None:
        kernel = SleepingKernel()
        stream = kernel.stream()

        async def sweep(seconds: float) -> float:
            begin = time.perf_counter()
            async for layer in layers:
                with layer.on(stream):
                    kernel.sleep(stream, seconds)
            await anyio.to_thread.run_sync(stream.sync)
            return time.perf_counter() - begin

        await sweep(0.0)
        for ratio in _RATIOS:
            seconds = copies / len(layers.plan.layers) * ratio
            await self._beside_spinners("Python", ratio, partial(sweep, seconds), _SPINNERS[:2])

    async def _beside_spinners(
        self, consumer: str, ratio: float, sweep: Callable[[], Awaitable[float]], spinners: Sequence[int]
    ) -> None:
        idle: float | None = None
        for count in spinners:
            with spinning(count):
                runs = [await sweep() for _ in range(self.passes)]
            wall = statistics.median(runs)
            idle = idle or wall
            self.add(Row(f"{self.name}, {self.slots} slots, {consumer}", ratio, count, runs, wall, wall / idle))


@asynccontextmanager
async def _open_feed(loader: Loader, path: Path, slots: int) -> AsyncGenerator[tuple[Any, list[int], int]]:
    """The C++ feed of a model's layers, and the addresses of slots for it, with nobody else who uses them."""
    engine, header = loader._active(), await read_header(path)
    assert engine.native is not None
    plan = plan_memory(
        header,
        free=loader.device.memory().free,
        dtype="bf16",
        slots=slots,
        allow=["stream"],
        workspace=0,
        kv_bytes=0,
        device=loader.device.info.kind,
        options=engine.options,
    )
    layers = [*plan.layers.values()]
    source = open_source(path)
    memory = [engine.tracker.allocate(plan.slot_nbytes, Purpose.SLOTS, f"slot {slot}") for slot in range(slots)]
    feed = NativeSlabFeed(engine, engine.native, Slabs(engine, layers), layers, _never, trace=False)
    try:
        await feed.fill([source])
        yield feed._feed, [slot.address for slot in memory], len(layers)
    finally:
        await anyio.to_thread.run_sync(feed.close)
        source.close()
        for slot in memory:
            slot.close()


async def _never(events: Sequence[Any]) -> None:
    raise AssertionError(events)


def _compile(index: int) -> tuple[Any, int]:
    """The code, to be kept, and the kernel's address."""
    core, driver = import_module("cuda.core"), import_module("cuda.bindings.driver")
    device = core.Device(index)
    device.set_current()
    options = core.ProgramOptions(std="c++17", arch=f"sm_{device.arch}")
    code = core.Program(_SOURCE, "c++", options).compile("cubin")
    result, function = driver.cuKernelGetFunction(code.get_kernel("work").handle)
    assert int(result) == 0, result
    return code, int(function)


if __name__ == "__main__":
    sys.exit(main())
