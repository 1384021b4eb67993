"""Host memory that one packed load adds, in a process of its own, against its bound: result + staging + 100 MB.

The result counts only where it lies in host memory. What a driver takes for itself when a device is first opened is
told apart, as no loader has a say in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from asyncload import Loader, Options
from asyncload.device import default_device, open_device
from asyncload.options import format_size
from bench._common import make_parser, model_file, options_of, print_table, run_async, write_record

_ALLOWANCE = 100_000_000


def resident(field: str) -> int:
    """Bytes of this process in memory: ``VmRSS`` now, ``VmHWM`` at most so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


async def child(file: str, device: str, options: Options) -> dict[str, Any]:
    """Loads the model and says how the process's memory went, in bytes."""
    imported = resident("VmRSS")
    opened = await anyio.to_thread.run_sync(open_device, device)
    before = resident("VmRSS")
    options = options.suited_to(opened.info.kind)
    async with Loader(device, options=options) as loader:
        entered = resident("VmRSS")
        with await loader.load(file, dtype="packed") as model:
            result = model.nbytes if model.device.kind == "host" else 0
        peak = resident("VmHWM")
    await anyio.to_thread.run_sync(opened.close)
    return {
        "imported": imported,
        "before": before,
        "entered": entered,
        "peak": peak,
        "result": result,
        "staging": options.staging,
        "added": peak - before,
        "bound": result + options.staging + _ALLOWANCE,
    }


def measure(arguments: argparse.Namespace, file: Path) -> dict[str, Any]:
    """Runs the load in a fresh process."""
    command = [sys.executable, "-m", "bench.memory", "--child", str(file)]
    command += ["--device", arguments.device] if arguments.device else []
    command += ["--engine", arguments.engine] if arguments.engine else []
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=Path(__file__).parents[1]).stdout
    results: dict[str, Any] = json.loads(output)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--child", metavar="FILE", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    options = options_of(arguments)
    if arguments.child:
        device = arguments.device or default_device()
        print(json.dumps(run_async(partial(child, arguments.child, device, options))))
        return 0
    with model_file(arguments) as file:
        results = measure(arguments, file)
    rows = [(name, format_size(nbytes)) for name, nbytes in results.items()]
    print_table("host memory of a process that loads a model, packed", [("at", "bytes"), *rows])
    write_record(arguments.json, "memory", results, options)
    return 0 if results["added"] <= results["bound"] else 1


if __name__ == "__main__":
    sys.exit(main())
