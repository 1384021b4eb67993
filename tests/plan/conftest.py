"""Headers made by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from asyncload.gguf import GGMLType, Header, TensorInfo

HeaderMaker = Callable[[Mapping[str, tuple[GGMLType, tuple[int, ...]]], Mapping[str, Any]], Header]


@pytest.fixture(scope="session")
def make_header() -> HeaderMaker:
    """Makes a header of tensors, by name their type and shape, and metadata (lists stand for arrays)."""

    def make(tensors: Mapping[str, tuple[GGMLType, tuple[int, ...]]], metadata: Mapping[str, Any]) -> Header:
        infos: dict[str, TensorInfo] = {}
        offset = 4096
        for name, (kind, shape) in tensors.items():
            info = TensorInfo(name, kind, shape, offset, kind.nbytes(math.prod(shape)))
            offset += -(-info.nbytes // 32) * 32
            infos[name] = info
        return Header(
            version=3,
            alignment=32,
            metadata=metadata,
            tensors=infos,
            data_offset=4096,
            nbytes=sum(info.nbytes for info in infos.values()),
        )

    return make
