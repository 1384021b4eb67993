"""What decoding on the host is measured against: this machine's limit of writing, gguf-py, and ggml's own C."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import gguf
import llvmlite.ir
import numba
import numba.extending
import numpy as np
import numpy.typing as npt

from asyncload.gguf import GGMLType
from asyncload.quant import DType
from bench import _ggml

__all__ = ["Bytes", "Job", "ggml_decoder", "gguf_decoder", "make_blocks", "writers"]

Bytes = npt.NDArray[np.uint8]
Job = Callable[[Bytes, Bytes], object]  # from blocks to weights

_LINE = 64  # bytes
_AHEAD = 2048  # bytes
_ROW = 4096  # weights: a usual width of a tensor, by rows of which gguf-py works
_ROWS = 4  # that differ: some of the quantizers take seconds for more
_SCRATCH = 16384  # weights that ggml decodes before it rounds them: 64 KiB that stay in the caches

_ir: Any = llvmlite.ir  # they carry no types
_nb: Any = numba
_extending: Any = numba.extending


# --- the limit: nothing but writing ----------------------------------------------------------------------------------


def _store_line(_typing: Any, _address: Any) -> Any:
    """Stores 64 zeros, and has the processor fetch the line that will be stored to a little later."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        i32, i64, i8 = (_ir.IntType(bits) for bits in (32, 64, 8))
        line = _ir.VectorType(i8, _LINE)
        builder.store(_ir.Constant(line, None), builder.inttoptr(arguments[0], line.as_pointer()), align=1)
        ahead = builder.inttoptr(builder.add(arguments[0], _ir.Constant(i64, _AHEAD)), i8.as_pointer())
        kind = _ir.FunctionType(_ir.VoidType(), [i8.as_pointer(), i32, i32, i32])
        prefetch = builder.module.globals.get("llvm.prefetch.p0") or _ir.Function(
            builder.module, kind, "llvm.prefetch.p0"
        )
        builder.call(prefetch, [ahead, *(_ir.Constant(i32, number) for number in (1, 3, 1))])
        return context.get_dummy_value()

    return _nb.types.void(_nb.types.intp), generate


_store: Any = _extending.intrinsic(_store_line)


def _store_lines(address: int, count: int) -> None:
    for line in range(count):
        _store(address + line * _LINE)


@cache
def _stores() -> Any:
    return _nb.njit("void(intp, intp)", nogil=True, error_model="numpy")(_store_lines)


def writers() -> dict[str, Job]:
    """Ways to write a buffer full, whatever the source; the fastest is the limit of this machine."""
    stores = _stores()
    return {
        "memset": lambda _, target: ctypes.memset(target.ctypes.data, 1, target.nbytes),
        "numpy fill": lambda _, target: target.fill(1),
        "stores, prefetched": lambda _, target: stores(target.ctypes.data, target.nbytes // _LINE),
    }


# --- the peers -------------------------------------------------------------------------------------------------------


@cache
def make_blocks(type_: GGMLType) -> Bytes:
    """Some blocks of normally distributed weights, as ggml quantizes them; bytes, in whole rows."""
    values = np.random.default_rng(0).standard_normal((_ROWS, _ROW)).astype(np.float32)
    match type_:
        case GGMLType.F64 | GGMLType.F32 | GGMLType.F16:
            return values.astype(f"<f{type_.type_size}").reshape(-1).view(np.uint8)
        case GGMLType.BF16:
            return (values.view(np.uint32) >> 16).astype(np.uint16).reshape(-1).view(np.uint8)
        case _:
            return _ggml.quantize(type_, values).reshape(-1)


def gguf_decoder(type_: GGMLType) -> Job | None:
    """gguf-py, which always makes float32, in memory of its own; None where it does not decode the type."""
    row = type_.nbytes(_ROW)
    if type_.quantized:
        with suppress(ValueError, NotImplementedError):  # of types newer than it, or that it only names
            number = gguf.GGMLQuantizationType(int(type_))
            gguf.dequantize(make_blocks(type_)[:row], number)
            return lambda source, _: gguf.dequantize(source.reshape(-1, row), number)
    return None


def ggml_decoder(type_: GGMLType, dtype: DType) -> Job | None:
    """The C of ggml, through a scratch for 16-bit results; None for plain floats, which it has no decoder for."""
    if not type_.quantized:
        return None
    decode = _ggml.decoder(type_)
    if dtype is DType.FLOAT32:
        return lambda source, target: decode(source.ctypes.data, target.ctypes.data, target.nbytes // 4)
    rounding = _ggml.rounding(dtype)

    def decode_and_round(source: Bytes, target: Bytes) -> None:
        scratch = np.empty(_SCRATCH, np.float32)
        step = type_.nbytes(_SCRATCH)
        begin, middle, end = source.ctypes.data, scratch.ctypes.data, target.ctypes.data
        for piece in range(source.nbytes // step):
            decode(begin + piece * step, middle, _SCRATCH)
            rounding(middle, end + piece * _SCRATCH * 2, _SCRATCH)

    return decode_and_round
