"""Kernels made ready: programs of one family and dtype each, from the cache on disk, which a subprocess fills.

Programs of fixed content are found again by whatever model needs one of their kernels.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Final

from asyncload.gguf import GGMLType
from asyncload.quant import DType
from asyncload.quant._subprocess import run_module
from asyncload.quant.cuda import CUDA_DECODED, can_decode, kernel_name
from asyncload.quant.cuda._program import Kernel, compile_program, has_cache, is_cached

__all__ = ["prepare"]

Pair = tuple[GGMLType, DType]
Program = tuple[str, DType]  # a family's name, and what it decodes to

_log: Final = logging.getLogger("asyncload.quant")


def prepare(arch: str, pairs: Collection[Pair]) -> dict[Pair, Kernel]:
    """Compiles what is not in the cache, and loads; see ``asyncload.quant.cuda.prepare``."""
    for pair in pairs:
        kernel_name(*pair)  # raises where there is none
    programs = list(dict.fromkeys((CUDA_DECODED[type_], dtype) for type_, dtype in pairs))
    cold = _cold(arch, programs)
    if cold and has_cache() and run_module("asyncload.quant.cuda._prepare", [arch, *_names(cold)]):
        cold = _cold(arch, cold)
    if cold:
        _log.warning("compiling the CUDA kernels %s in this process", ", ".join(_names(cold)))
    code = {program: compile_program(arch, _pairs(*program)) for program in programs}
    return {(type_, dtype): Kernel(code[CUDA_DECODED[type_], dtype], type_, dtype) for type_, dtype in pairs}


def _cold(arch: str, programs: Iterable[Program]) -> list[Program]:
    return [program for program in programs if not is_cached(arch, _pairs(*program))]


def _pairs(family: str, dtype: DType) -> list[Pair]:
    """The kernels of a program."""
    return [(type_, dtype) for type_, name in CUDA_DECODED.items() if name == family and can_decode(type_, dtype)]


def _names(programs: Iterable[Program]) -> list[str]:
    return [f"{family}:{dtype}" for family, dtype in programs]


def main(arguments: Sequence[str]) -> None:
    """Compiles programs into the cache on disk: an architecture, then each program as ``kquants:float16``."""
    arch, *programs = arguments
    for program in programs:
        family, _, dtype = program.partition(":")
        compile_program(arch, _pairs(family, DType(dtype)))


if __name__ == "__main__":
    main(sys.argv[1:])
