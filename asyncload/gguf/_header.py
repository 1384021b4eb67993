"""What a header says: the values that the parser hands out."""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeVar

from asyncload.gguf._array import Array, Scalar
from asyncload.gguf._types import GGMLType

__all__ = ["Header", "TensorInfo", "Value", "merge_sorted"]

T = TypeVar("T")

Value = Scalar | Array

# ASCII digits, and few of them: a name is whatever its writer liked.
_LAYER: Final = re.compile(r"blk\.([0-9]{1,9})\.")
_RUN: Final = 512


class TensorInfo(NamedTuple):
    """One tensor of a file: its ``shape`` is row-major, as torch has it (ggml's dimensions reversed).

    ``offset`` is the byte in its own file at which its data begins, and ``part`` the index of that file (0 where there
    is one only).
    """

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    part: int = 0

    @property
    def n_weights(self) -> int:
        """The number of weights: 1 without dimensions, 0 where one of them is zero."""
        return math.prod(self.shape)

    @property
    def layer(self) -> int | None:
        """N for a tensor called ``blk.N.``…, None for one that belongs to no layer."""
        match = _LAYER.match(self.name)
        return int(match[1]) if match else None


@dataclass(frozen=True)
class Header:
    """What a GGUF model says about itself before its data: metadata and tensors, in the order of the file.

    ``data_offset`` is the byte at which the data of the first part begins, ``nbytes`` the bytes of all tensors
    without the gaps between them.
    """

    version: int
    alignment: int
    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]
    data_offset: int
    nbytes: int
    parts: int = 1

    @cached_property
    def layers(self) -> Mapping[int, tuple[TensorInfo, ...]]:
        """The tensors called ``blk.N.``… by N, ascending; grouped when it is first asked for."""
        layers: dict[int, list[TensorInfo]] = {}
        for tensor in self.tensors.values():
            if (layer := tensor.layer) is not None:
                layers.setdefault(layer, []).append(tensor)
        return MappingProxyType({layer: tuple(layers[layer]) for layer in sorted(layers)})


def merge_sorted(items: Iterable[T], key: Callable[[T], Any], step: Callable[[], None]) -> Iterator[T]:
    """Items in ascending order; they are sorted in short runs, with calls of ``step``, so that no one step is long."""
    rest = iter(items)
    runs: list[list[T]] = []
    while run := sorted(islice(rest, _RUN), key=key):
        runs.append(run)
        for _ in run:
            step()
    for item in heapq.merge(*runs, key=key):
        step()
        yield item
