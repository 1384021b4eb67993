"""What the benchmarks share: arguments, the machine's description, records, models of a wanted size, tables."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, TypeVar, get_args

import anyio

from asyncload.cli.text import table
from asyncload.options import EngineOption, Options
from asyncload.testing import synthesize

__all__ = [
    "make_parser",
    "median_seconds",
    "model_file",
    "options_of",
    "print_table",
    "run_async",
    "synthetic_file",
    "write_record",
]

T = TypeVar("T")

_PACKAGES: Final = (
    *("asyncload", "numpy", "numba", "gguf", "anyio", "uvloop", "cuda-core"),
    *("torch", "safetensors", "instanttensor", "transformers", "accelerate"),
)


def make_parser(description: str, *, device: bool = True, loads: bool = True) -> argparse.ArgumentParser:
    """The arguments of every benchmark, those of one that uses a device, and those of one that loads a model.

    The loader's options come from the environment (``ASYNCLOAD_CHUNK_SIZE``); ``options_of`` reads both.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="toy size: shows that it works, not how fast")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures with machine, date and commit")
    if device:
        parser.add_argument("--device", metavar="NAME", help="host or cuda:N (default: the first GPU, else host)")
    if loads:
        parser.add_argument(
            "--engine", choices=get_args(EngineOption), help="what moves the bytes (default: ASYNCLOAD_ENGINE, or auto)"
        )
        model = parser.add_argument_group("the model (a synthetic one, unless a file is given)")
        model.add_argument("--file", metavar="FILE", type=Path, help="a GGUF model")
        model.add_argument("--preset", default="llama-1b", help="llama-1b (default), llama-8b, qwen3-32b")
        model.add_argument("--quant", default="Q4_K_M", help="Q4_K_M (default), Q8_0, Q4_0, BF16, F16 or F32")
        model.add_argument("--layers", type=int, metavar="N", help="another number of layers than the preset's")
    return parser


def options_of(arguments: argparse.Namespace) -> Options:
    """The environment's options, and over them the arguments that are options; ``engine`` is one that is there."""
    names = ("engine", "nice")
    given = {name: value for name in names if (value := getattr(arguments, name, None)) is not None}
    options = replace(Options.from_env(), **given)
    return replace(options, engine=_default_engine()) if options.engine == "auto" else options


def _default_engine() -> EngineOption:
    return "native" if _native_compiler() else "python"


@contextmanager
def model_file(arguments: argparse.Namespace) -> Generator[Path]:
    """The model that the arguments ask for, in the page cache; a synthetic one is removed afterwards."""
    if arguments.file is not None:
        with arguments.file.open("rb", buffering=0) as file:
            while file.read(16 << 20):
                pass
        yield arguments.file
        return
    preset = "tiny" if arguments.quick else arguments.preset
    with synthetic_file(preset, arguments.quant, layers=arguments.layers) as path:
        yield path


@contextmanager
def synthetic_file(preset: str, quant: str, **more: Any) -> Generator[Path]:
    """A model by ``synthesize``, in the page cache; it is removed afterwards."""
    with TemporaryDirectory(prefix="asyncload-bench-") as folder:
        (path,) = synthesize(Path(folder) / f"{preset}-{quant}.gguf", preset=preset, quant=quant, **more)
        yield path


def run_async(function: Callable[[], Awaitable[T]]) -> T:
    """Runs an async function on uvloop where that is installed, else on asyncio."""
    return anyio.run(function, backend_options={"use_uvloop": find_spec("uvloop") is not None})


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    """The median time of some calls."""
    seconds: list[float] = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def print_table(title: str, rows: Iterable[Sequence[object]]) -> None:
    """Prints rows, the first of which is the heading; the first column is text, the others are numbers."""
    lines = list(rows)
    print(f"\n{title}\n{table(lines, align='<' + '>' * (len(lines[0]) - 1))}")


def write_record(path: Path | None, benchmark: str, results: Any, options: Options | None = None) -> None:
    """Writes a benchmark's figures as JSON with everything that is needed to judge them; nothing where path is None.

    ``options`` are those of the loads (None: the environment's).
    """
    if path is None:
        return
    record = {
        "benchmark": benchmark,
        "command": ["python", "-m", f"bench.{benchmark}", *sys.argv[1:]],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "machine": _machine(),
        "options": asdict(options or Options.from_env()),
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


def _git(*arguments: str) -> str | None:
    result = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return result.stdout.strip() if result.returncode == 0 else None


def _machine() -> dict[str, Any]:
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "native_engine": _native_compiler(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def _native_compiler() -> str | None:
    """What compiled the native engine, or None where it was not built."""
    try:
        return str(import_module("asyncload_native").compiler)
    except ImportError:
        return None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
