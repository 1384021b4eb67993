"""Compilers run in a process of their own: Numba's holds the interpreter lock for tens of milliseconds at a time."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

__all__ = ["run_module"]

_log: Final = logging.getLogger("asyncload.quant")
_TIMEOUT: Final = 300.0  # seconds for all kernels; each takes a tenth on a machine with nothing else to do


def run_module(module: str, arguments: Sequence[str]) -> bool:
    """Runs a module of ours, with the same packages as here, and says whether that went well. Blocks."""
    if getattr(sys, "frozen", False) or not sys.executable:
        return False
    command = [sys.executable, "-P", "-m", module, *arguments]  # -P keeps the working directory's packages out
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
    started = time.monotonic()
    try:
        subprocess.run(  # noqa: S603 - our own module
            command,
            env=environment,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=_TIMEOUT,
            process_group=0,  # an interrupt from the terminal is this process's affair
        )
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("kernels could not be compiled in a subprocess: %s\n%s", error, getattr(error, "stderr", ""))
        return False
    _log.info("compiled %s in %.1f s", ", ".join(arguments), time.monotonic() - started)
    return True
