"""Which tensors: names, globs and layer numbers."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from asyncload.errors import PlanError, TensorNotFoundError
from asyncload.gguf import Header, TensorInfo

__all__ = ["Selection", "match_names", "select_tensors"]

Selection = str | int | Iterable[str | int] | None


def match_names(names: Iterable[str], pattern: str) -> list[str]:
    """The names that equal the pattern or match it as a glob, in order; a name is never mistaken for a glob.

    Raises ``TensorNotFoundError`` if there is none.
    """
    names = list(names)
    found = [name for name in names if name == pattern] or [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise TensorNotFoundError(f"no tensor is called, or matches, {pattern!r}", name=pattern)
    return found


def select_tensors(header: Header, selection: Selection = None) -> list[TensorInfo]:
    """The tensors that a selection names, each once, in file order; ``None`` selects all.

    A selection is a tensor's name, a glob (``"blk.*.attn_?.weight"``), a layer's number, or an iterable of these.
    Raises ``TensorNotFoundError`` for a part of it that selects nothing.
    """
    if selection is None:
        return list(header.tensors.values())
    try:
        items = [selection] if isinstance(selection, str | int) else list(selection)
    except TypeError as error:
        raise PlanError(f"a selection is made of names, globs and layer numbers, not {selection!r}") from error
    chosen: set[str] = set()
    for item in items:
        if isinstance(item, str):
            chosen.update(match_names(header.tensors, item))
        elif item in header.layers:
            chosen.update(info.name for info in header.layers[item])
        else:
            raise TensorNotFoundError(f"there is no layer {item}", name=str(item))
    return [info for info in header.tensors.values() if info.name in chosen]
