"""The tables of numbers that belong to some types' definitions, as the ``gguf`` package has them.

It is imported when a table is asked for, as it takes a while. A host kernel that was compiled before needs none; a CUDA
program is found again by its text, which has its tables in it.
"""

from __future__ import annotations

from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["fingerprint", "grid", "values"]


def grid(name: str) -> list[list[int]]:
    """The entries of a type's grid: four or eight small integers each."""
    quant = getattr(_quants(), name)
    quant.init_grid()
    entries: list[list[int]] = quant.grid.astype(int).reshape(quant.grid_shape).tolist()
    return entries


def values(name: str) -> list[int]:
    """The sixteen signed bytes that the codes of a type mean."""
    return [int(value) for value in getattr(_quants(), name).kvalues]


def fingerprint() -> bytes:
    """What changes with the tables, found without importing them: their source, or nothing where it cannot be read."""
    package = find_spec("gguf")
    if package is None or package.origin is None:
        return b""
    with suppress(OSError):
        return Path(package.origin).with_name("quants.py").read_bytes()
    return b""


def _quants() -> Any:
    import gguf.quants

    return gguf.quants
