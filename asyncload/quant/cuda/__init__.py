"""Blocks to numbers on a CUDA device: one CUDA C++ kernel for each ggml type and dtype, compiled when a load needs it.

Importing this costs nothing: ``cuda.core`` and the ``gguf`` package, which has the grids of the IQ types, come with
``prepare`` and ``compile_kernels``. The kernels need no CUDA headers, and compiling them needs neither a device nor a
driver.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from asyncload.errors import UnsupportedQuantError
from asyncload.gguf import GGMLType
from asyncload.quant import DType, native_dtype
from asyncload.quant import can_decode as can_decode_on_host

if TYPE_CHECKING:
    from asyncload.quant.cuda._program import Kernel

__all__ = ["ALIGNMENT", "can_decode", "compile_kernels", "compiler", "kernel_name", "prepare", "source"]

#: What the address of a target is a multiple of, in bytes; where the type has no blocks, the weight's size is enough.
ALIGNMENT: Final = 16


def can_decode(type: GGMLType, dtype: DType) -> bool:  # noqa: A002 - the field's name
    """Whether there is a kernel for a pair; there is none that would only copy."""
    return native_dtype(type) is not dtype and can_decode_on_host(type, dtype)


def kernel_name(type: GGMLType, dtype: DType) -> str:  # noqa: A002
    """The name of a pair's kernel in the program; raises ``UnsupportedQuantError`` where there is none."""
    if not can_decode(type, dtype):
        raise UnsupportedQuantError(
            f"{type.name} cannot be decoded to {dtype} on a CUDA device", tensor="", type=type.name, dtype=str(dtype)
        )
    return f"decode_{type.name}_{dtype}"


def source(pairs: Collection[tuple[GGMLType, DType]]) -> str:
    """The CUDA C++ program with the kernels of these pairs, the same for the same set of them; needs no CUDA.

    Raises ``UnsupportedQuantError`` for a pair that has no kernel.
    """
    from asyncload.quant.cuda._source import assemble

    return assemble(pairs)


def compile_kernels(arch: str, pairs: Collection[tuple[GGMLType, DType]]) -> Any:
    """Compiles the kernels of these pairs for an architecture such as ``"sm_90"``, or finds them in the cache on disk.

    Returns the ``cuda.core.ObjectCode`` of a cubin. Blocks for up to some seconds, without the interpreter lock while
    the compiler runs. The cache is ``cuda.core``'s, in the user's cache folder; where that cannot be used, the logger
    ``asyncload.quant`` says so. Raises ``UnsupportedQuantError`` for a pair that has no kernel, and
    ``BackendUnavailableError`` where NVRTC is missing or does not know the architecture.
    """
    from asyncload.quant.cuda._program import compile_program

    return compile_program(arch, pairs)


def prepare(arch: str, pairs: Collection[tuple[GGMLType, DType]]) -> dict[tuple[GGMLType, DType], Kernel]:
    """Loads the kernels of these pairs into the calling thread's current context, for a device of that architecture.

    Blocks, for a second or two where a kernel is not in the cache on disk: it is compiled then, with the others of its
    family for the dtype, and without the interpreter lock. Raises ``UnsupportedQuantError`` for a pair that has no
    kernel, before anything is compiled, and ``BackendUnavailableError`` as ``compile_kernels`` does.
    """
    from asyncload.quant.cuda._prepare import prepare as prepare_kernels

    return prepare_kernels(arch, pairs)


def compiler() -> tuple[str, Path | None]:
    """The version of NVRTC, and the folder that keeps what it has compiled; None where there is none.

    Raises ``BackendUnavailableError`` where NVRTC is missing.
    """
    from asyncload.quant.cuda._program import compiler as describe_compiler

    return describe_compiler()
