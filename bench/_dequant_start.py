"""How long a fresh process takes to its first decoded tensor, against what Numba alone takes to its first call."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

__all__ = ["START_GOAL", "measure_start"]

START_GOAL: Final = 1.2

_NUMBA: Final = "a first call of Numba's"
_OURS: Final = "a first decoded tensor"
_SCRIPTS: Final = {
    _NUMBA: """
import numba
@numba.njit(cache=True)
def add(a, b):
    return a + b
add(1, 2)
""",
    _OURS: """
from asyncload.gguf import GGMLType
from asyncload.quant import DType, decode
decode(GGMLType.Q4_K, DType.BFLOAT16, memoryview(bytes(144 * 64)), memoryview(bytearray(512 * 64)))
""",
}


def measure_start(rounds: int) -> dict[str, float]:
    """Median seconds from the start of a process, by what it does; everything is compiled and cached before."""
    with TemporaryDirectory(prefix="asyncload-bench-") as folder:
        files = {what: Path(folder) / f"{number}.py" for number, what in enumerate(_SCRIPTS)}
        for what, file in files.items():
            file.write_text(f"{_SCRIPTS[what]}\nimport time\nprint(time.monotonic())\n")
        seconds: dict[str, list[float]] = {what: [] for what in files}
        for number in range(rounds + 1):
            for what, file in files.items():
                taken = _run(file)
                if number:  # the first round compiles
                    seconds[what].append(taken)
    return {what: statistics.median(taken) for what, taken in seconds.items()}


def _run(file: Path) -> float:
    """Seconds from before the process is made until its script has done its work."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    begin = time.monotonic()
    result = subprocess.run([sys.executable, str(file)], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return float(result.stdout) - begin
