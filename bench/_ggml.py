"""ggml's own C, through ctypes, as the package ``libggml-python`` ships it: its quantizers, decoders and roundings."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from asyncload.gguf import GGMLType
from asyncload.quant import DType

__all__ = ["AVAILABLE", "Rows", "decoder", "quantize", "rounding"]

Rows = Callable[[int, int, int], object]  # the addresses of source and target, the number of weights

AVAILABLE = find_spec("libggml") is not None


@cache
def _library(part: str) -> Any:
    """``base``, which has the reference code, or ``cpu``, which is compiled for this processor."""
    found = find_spec("libggml")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("ggml's C comes with the package libggml-python", name="libggml")
    (path,) = Path(found.origin).parent.glob(f"lib*/libggml-{part}.so")
    library: Any = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    if part == "cpu":
        library.ggml_cpu_init()
    return library


def _rows(part: str, name: str) -> Rows:
    function: Any = getattr(_library(part), name)
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    converted: Rows = function
    return converted


@cache
def decoder(type_: GGMLType) -> Rows:
    """The reference decoder of a quantized type, to float32."""
    letters = len(type_.name) - 1 if type_.name.endswith("_K") else len(type_.name)  # dequantize_row_q4_K
    return _rows("base", f"dequantize_row_{type_.name[:letters].lower()}{type_.name[letters:]}")


@cache
def rounding(dtype: DType) -> Rows:
    """From float32 to one of the 16-bit dtypes."""
    _library("base")
    return _rows("cpu", {DType.FLOAT16: "ggml_cpu_fp32_to_fp16", DType.BFLOAT16: "ggml_cpu_fp32_to_bf16"}[dtype])


def quantize(type_: GGMLType, weights: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Blocks of weights in rows, as uint8 of shape (blocks, bytes of a block).

    The types that want to know how much each column matters are given the sum of its squares.
    """
    function: Any = _library("base").ggml_quantize_chunk
    pointers = [ctypes.c_void_p] * 2
    function.argtypes = [ctypes.c_int, *pointers, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    function.restype = ctypes.c_size_t
    weights = np.ascontiguousarray(weights)
    n_rows, width = weights.shape
    importance = np.square(weights).sum(axis=0, dtype=np.float32)
    blocks = np.empty((weights.size // type_.block_size, type_.type_size), np.uint8)
    addresses = weights.ctypes.data, blocks.ctypes.data
    written = function(int(type_), *addresses, 0, n_rows, width, importance.ctypes.data)
    if written != blocks.nbytes:
        raise ValueError(f"ggml made {written} bytes of {type_.name}, not {blocks.nbytes}")
    return blocks
