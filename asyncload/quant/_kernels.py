"""One Numba function for all pairs of type and dtype: its first argument's type names the pair, intrinsics write it.

So there is one function, with one index in Numba's cache on disk, and a signature a pair. (Functions made in closures
over their intrinsics would never be found there again.) With the machine code of each, Numba keeps two ways into it:
one for the interpreter, and a C function.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import llvmlite
import numba
import numba.core.registry
import numba.extending

from asyncload.gguf import GGMLType
from asyncload.quant import (
    DType,
    _block,
    _floats,
    _fp4,
    _iquants,
    _kquants,
    _legacy,
    _rounding,
    _tables,
    _ternary,
    _vector,
    native_dtype,
)
from asyncload.quant._block import Block, Decoder, Processor
from asyncload.quant._vector import I8, I64, ir

__all__ = ["DECODERS", "KERNEL", "processor", "signature"]

_FAMILIES: Final = (_floats, _legacy, _kquants, _iquants, _ternary, _fp4)
DECODERS: Final[dict[GGMLType, Decoder]] = {
    type_: decoder for family in _FAMILIES for type_, decoder in family.DECODERS.items()
}

# Numba carries no types.
_nb: Any = numba
_extending: Any = numba.extending
_registry: Any = numba.core.registry

_SOURCES: Final = (*_FAMILIES, _block, _rounding, _tables, _vector)
_BULK: Final = 32  # weights of a plain float type that are decoded at a time
_LEVELS: Final = {  # of the psABI's processor levels
    "x86-64-v2": {"ssse3"},
    "x86-64-v3": {"ssse3", "f16c"},
    "x86-64-v4": {"ssse3", "f16c", "avx512bw"},
}


def _target() -> tuple[str, str, str]:
    """The triple, processor and features that Numba compiles for (``NUMBA_CPU_NAME`` and its like may set them)."""
    triple, name, features = _registry.cpu_target.target_context.codegen().magic_tuple()
    return triple, name, features


def processor() -> Processor:
    """What the compiled code can use of the processor."""
    triple, name, flags = _target()
    features = {flag[1:] for flag in flags.split(",") if flag.startswith("+")} | _LEVELS.get(name, set())
    features -= {flag[1:] for flag in flags.split(",") if flag.startswith("-")}
    if triple.startswith(("aarch64", "arm64")):
        return Processor(half=True, permute=False, look_up="llvm.aarch64.neon.tbl1.v16i8")
    look_up = "llvm.x86.ssse3.pshuf.b.128" if "ssse3" in features else ""
    return Processor(half="f16c" in features, permute="avx512bw" in features, look_up=look_up)


@cache
def _version() -> str:
    """A hash of all that the machine code depends on, as Numba's index watches this file alone.

    It is part of each signature, so code from other sources, or for another processor, is never taken for this one's,
    whatever happened to the index.
    """
    blocks = [(type_.name, type_.block_size, type_.type_size) for type_ in GGMLType]
    digest = sha256(repr((_target(), numba.__version__, llvmlite.__version__, blocks)).encode())
    digest.update(_tables.fingerprint())
    for module in _SOURCES:
        try:
            digest.update(Path(str(module.__file__)).read_bytes())
        except OSError:  # a frozen application has no sources; Numba watches the executable then
            continue
    return digest.hexdigest()[:16]


def signature(type: GGMLType, dtype: DType) -> tuple[Any, ...]:  # noqa: A002 - the field's name
    """The kernel's argument types for a pair: the addresses of source and target, the number of blocks.

    The first is an integer like the others whose type's name says what the blocks are and what to make of them.
    """
    intp = _nb.types.intp
    source = _nb.types.Integer(f"{type.name} {dtype} {_version()}", bitwidth=intp.bitwidth, signed=True)
    return source, intp, intp


def _pair(source: Any) -> tuple[GGMLType, DType]:
    """The pair that the kernel's first argument names by its type."""
    type_name, dtype, _ = source.name.split()
    return GGMLType[type_name], DType(dtype)


def _group_size(_typing: Any, source: Any) -> Any:
    """How many blocks are decoded at a time, as a constant."""
    type_, _ = _pair(source)
    size = 1 if type_.quantized else _BULK
    return _nb.types.intp(source), _constant(size)


def _constant(value: int) -> Callable[..., Any]:
    def generate(*_: Any) -> Any:
        return ir.Constant(I64, value)

    return generate


def _decode_at(size: int, source: Any, target: Any, index: Any) -> Any:
    """The signature and the code generator of an intrinsic that decodes the ``index``-th group of ``size`` blocks."""
    type_, dtype = _pair(source)
    decoder = Block.copy if native_dtype(type_) is dtype else DECODERS[type_]

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        source, target, index = arguments
        weights = type_.block_size * size
        pointers = [
            builder.inttoptr(builder.add(address, builder.mul(index, ir.Constant(I64, nbytes))), I8.as_pointer())
            for address, nbytes in ((source, type_.type_size * size), (target, weights * dtype.itemsize))
        ]
        decoder(Block(builder, *pointers, weights=weights, dtype=dtype, processor=processor()))
        return context.get_dummy_value()

    return _nb.types.void(source, target, index), generate


def _decode_group(_typing: Any, source: Any, target: Any, index: Any) -> Any:
    type_, _ = _pair(source)
    return _decode_at(1 if type_.quantized else _BULK, source, target, index)


def _decode_one(_typing: Any, source: Any, target: Any, index: Any) -> Any:
    return _decode_at(1, source, target, index)


group_size: Any = _extending.intrinsic(_group_size)
decode_group: Any = _extending.intrinsic(_decode_group)
decode_one: Any = _extending.intrinsic(_decode_one)


def _decode_blocks(source: Any, target: Any, count: int) -> Any:
    """Decodes ``count`` blocks and returns 1 (where Numba's C function returns 0, an exception stopped it).

    Compiled, once for each pair.
    """
    size = group_size(source)
    groups = count // size
    for group in range(groups):
        decode_group(source, target, group)
    for block in range(groups * size, count):
        decode_one(source, target, block)
    return _nb.int32(1)


def _jit(function: Callable[..., Any]) -> Any:
    """Compiles without the interpreter lock and without fast math; cached on disk where a folder can be written to."""
    kernel = _nb.njit(nogil=True, error_model="numpy")(function)
    with suppress(RuntimeError):  # neither beside this file nor in the user's cache
        kernel.enable_caching()
    return kernel


KERNEL: Final[Any] = _jit(_decode_blocks)
