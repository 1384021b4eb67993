"""The metadata of a model's architecture, as the hostile input that it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from asyncload.errors import FormatError
from asyncload.gguf import Value

__all__ = ["MOST", "ArchitectureMetadata", "item"]

MOST: Final = 1 << 24  # no model has so many heads, or such a long context


class ArchitectureMetadata:
    """A header's values whose keys begin with its ``general.architecture``; ``trusted`` until one of them cannot be."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = values
        name = values.get("general.architecture")
        self.architecture = name if isinstance(name, str) else ""
        self.trusted = True

    def raw(self, key: str) -> Value | None:
        """The value itself."""
        return self._values.get(f"{self.architecture}.{key}")

    def groups(self) -> set[str]:
        """What there are values below of: ``attention`` where there is ``attention.head_count``."""
        begin = len(self.architecture) + 1
        names = (name[begin:] for name in self._values if name.startswith(f"{self.architecture}."))
        return {name.partition(".")[0] for name in names if "." in name}

    def number(self, key: str, layer: int = 0) -> int | None:
        """A whole number that is not negative, a layer's own where they differ; None if there is none to be trusted."""
        value: object = self.raw(key)
        if value is None:
            return None
        if isinstance(value, Sequence) and not isinstance(value, str):
            value = item(value, layer)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST:
            return value
        self.trusted = False
        return None


def item(values: Sequence[object], layer: int) -> object:
    """One layer's value of an array; None where it has none, or none that can be decoded."""
    try:
        return values[layer]
    except (IndexError, FormatError):
        return None
