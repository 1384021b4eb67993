"""Kernels made ready: programs of one family and dtype each, compiled or from the cache on disk.

Programs of fixed content are found again by whatever model needs one of their kernels.
"""

from __future__ import annotations

from collections.abc import Collection

from asyncload.gguf import GGMLType
from asyncload.quant import FAMILIES, DType
from asyncload.quant._yielding import yielding
from asyncload.quant.cuda import can_decode, kernel_name
from asyncload.quant.cuda._program import Kernel, compile_program

__all__ = ["prepare"]

Pair = tuple[GGMLType, DType]


def prepare(arch: str, pairs: Collection[Pair]) -> dict[Pair, Kernel]:
    """Compiles what is not in the cache, and loads; see ``asyncload.quant.cuda.prepare``."""
    for pair in pairs:
        kernel_name(*pair)  # raises where there is none
    with yielding():
        programs = dict.fromkeys((FAMILIES[type_], dtype) for type_, dtype in pairs)
        code = {(family, dtype): compile_program(arch, _pairs(family, dtype)) for family, dtype in programs}
        return {(type_, dtype): Kernel(code[FAMILIES[type_], dtype], type_, dtype) for type_, dtype in pairs}


def _pairs(family: str, dtype: DType) -> list[Pair]:
    """The kernels of a program."""
    return [(type_, dtype) for type_, name in FAMILIES.items() if name == family and can_decode(type_, dtype)]
