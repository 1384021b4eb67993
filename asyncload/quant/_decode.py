"""One call a piece of tensor: checks, addresses, and a kernel that holds no lock."""

from __future__ import annotations

import numpy as np

from asyncload.errors import RangeError
from asyncload.gguf import GGMLType
from asyncload.quant import DType
from asyncload.quant._prepare import READY, prepare

__all__ = ["decode"]


def decode(type: GGMLType, dtype: DType, source: memoryview, target: memoryview) -> None:  # noqa: A002
    """Decodes whole blocks; see ``asyncload.quant.decode``."""
    kernel = READY.get((type, dtype))
    if kernel is None:
        prepare([(type, dtype)])
        kernel = READY.get((type, dtype))
    if target.readonly:
        raise TypeError("the target of decoding is read-only")
    count, rest = divmod(source.nbytes, type.type_size)
    if rest:
        raise RangeError(
            f"{source.nbytes} bytes are no whole blocks of {type.name}, of {type.type_size} bytes each",
            offset=0,
            nbytes=source.nbytes - rest + type.type_size,
            limit=source.nbytes,
        )
    nbytes = count * type.block_size * dtype.itemsize
    if nbytes != target.nbytes:
        raise RangeError(
            f"{count} blocks of {type.name} are {nbytes} bytes of {dtype}; the target has {target.nbytes}",
            offset=0,
            nbytes=nbytes,
            limit=target.nbytes,
        )
    if not count:
        return
    source_bytes, target_bytes = np.frombuffer(source, np.uint8), np.frombuffer(target, np.uint8)
    if kernel is None:
        np.copyto(target_bytes, source_bytes)
    else:
        kernel.call(source_bytes.ctypes.data, target_bytes.ctypes.data, count)
