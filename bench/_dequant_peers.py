"""What decoding on the host is measured against: this machine's limit of writing, gguf-py, and ggml's own C."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import llvmlite.ir
import numba
import numba.extending
import numpy as np
import numpy.typing as npt

from asyncload.gguf import GGMLType
from asyncload.quant import DType

__all__ = ["Bytes", "ggml_decoder", "gguf_decoder", "writers"]

Bytes = npt.NDArray[np.uint8]
Decode = Callable[[Bytes, Bytes], object]

_LINE = 64  # bytes
_AHEAD = 2048  # bytes
_SCRATCH = 8192  # weights that ggml decodes before it rounds them: they stay in the first-level cache

_ir: Any = llvmlite.ir  # they carry no types
_nb: Any = numba


# --- the limit: nothing but writing ----------------------------------------------------------------------------------


def _store_line(_typing: Any, address: Any) -> Any:
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


_store: Any = _nb.extending.intrinsic(_store_line)


def _store_lines(address: int, count: int) -> None:
    for line in range(count):
        _store(address + line * _LINE)


@cache
def _stores() -> Any:
    return _nb.njit("void(intp, intp)", nogil=True, error_model="numpy")(_store_lines)


def writers() -> Mapping[str, Callable[[Bytes], object]]:
    """Ways to write a buffer full; the fastest is the limit of this machine."""
    stores = _stores()
    return {
        "memset": lambda target: ctypes.memset(target.ctypes.data, 1, target.nbytes),
        "numpy fill": lambda target: target.fill(1),
        "stores, prefetched": lambda target: stores(target.ctypes.data, target.nbytes // _LINE),
    }


# --- the peers -------------------------------------------------------------------------------------------------------


def gguf_decoder(type_: GGMLType) -> Decode:
    """gguf-py, which makes float32 in memory of its own, whatever is asked for."""
    number = gguf.GGMLQuantizationType(int(type_))
    return lambda source, _: gguf.dequantize(source.reshape(-1, type_.type_size), number)


def ggml_decoder(type_: GGMLType, dtype: DType) -> Decode | None:
    """ggml's C as the package ``libggml-python`` ships it, through a scratch for 16-bit results; None without it.

    Plain floats are left out: their row functions are no decoders in ggml.
    """
    library = _ggml()
    if library is None or not type_.quantized:
        return None
    pointers = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    decode: Any = getattr(library, f"dequantize_row_{type_.name[0].lower()}{type_.name[1:]}")
    decode.argtypes, decode.restype = pointers, None
    if dtype is DType.FLOAT32:
        return lambda source, target: decode(source.ctypes.data, target.ctypes.data, target.nbytes // 4)
    rounded: Any = library.ggml_fp32_to_fp16_row if dtype is DType.FLOAT16 else library.ggml_fp32_to_bf16_row
    rounded.argtypes, rounded.restype = pointers, None

    def decode_and_round(source: Bytes, target: Bytes) -> None:
        scratch = np.empty(_SCRATCH, np.float32)
        step = _SCRATCH // type_.block_size * type_.type_size
        begin, middle, end = source.ctypes.data, scratch.ctypes.data, target.ctypes.data
        for piece in range(source.nbytes // step):
            decode(begin + piece * step, middle, _SCRATCH)
            rounded(middle, end + piece * _SCRATCH * 2, _SCRATCH)

    return decode_and_round


@cache
def _ggml() -> Any:
    found = find_spec("libggml")
    if found is None or found.origin is None:
        return None
    libraries = sorted(Path(found.origin).parent.glob("lib*/libggml-base.so"))
    return ctypes.CDLL(str(libraries[0])) if libraries else None
