from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from asyncload.cli import main

LOAD = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(name)s %(levelname)s %(message)s")
import asyncload.blocking
asyncload.blocking.load(sys.argv[1], device="host", dtype="f16")
"""


def run(environment: dict[str, str], *arguments: str) -> tuple[str, str]:
    result = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


def test_after_it_no_load_compiles(small_model: Path, tmp_path: Path) -> None:
    warm, cold = {"NUMBA_CACHE_DIR": str(tmp_path / "warm")}, {"NUMBA_CACHE_DIR": str(tmp_path / "cold")}
    out, _ = run(warm, "-m", "asyncload", "warmup", "--device", "host", "--dtype", "f16")
    assert out.startswith("host: kernels to f16 are ready")
    assert "compiled" in run(cold, "-c", LOAD, str(small_model))[1]
    assert "compil" not in run(warm, "-c", LOAD, str(small_model))[1]


@pytest.mark.parametrize("dtype", ["i8", "packed"])
def test_a_dtype_that_nothing_is_decoded_to(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["warmup", "--device", "host", "--dtype", dtype]) == 1
    assert dtype in capsys.readouterr().err
