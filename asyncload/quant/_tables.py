"""The tables of numbers that belong to some types' definitions, as the ``gguf`` package has them.

It is imported when a table is asked for, as it takes a while: a kernel that was compiled before needs none.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["grid", "origin", "values"]


def grid(name: str) -> list[list[int]]:
    """The entries of a type's grid: four or eight small integers each."""
    quant = getattr(_quants(), name)
    quant.init_grid()
    entries: list[list[int]] = quant.grid.astype(int).reshape(quant.grid_shape).tolist()
    return entries


def values(name: str) -> list[int]:
    """The sixteen signed bytes that the codes of a type mean."""
    return [int(value) for value in getattr(_quants(), name).kvalues]


def origin() -> Path:
    """The file that has the tables, found without an import; it need not exist."""
    package = find_spec("gguf")
    return Path(str(package and package.origin)).with_name("quants.py")


def _quants() -> Any:
    import gguf.quants

    return gguf.quants
