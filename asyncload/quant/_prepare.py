"""Kernels made ready: from the cache on disk, which a subprocess fills where it is cold."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Final

from asyncload.errors import UnsupportedQuantError
from asyncload.gguf import GGMLType
from asyncload.quant import DType, can_decode, native_dtype, refusal
from asyncload.quant._subprocess import run_module
from asyncload.quant._yielding import yielding

if TYPE_CHECKING:
    from asyncload.quant._compiled import Kernel

__all__ = ["READY", "kernel_address", "prepare"]

Pair = tuple[GGMLType, DType]

READY: Final[dict[Pair, Kernel]] = {}

_log: Final = logging.getLogger("asyncload.quant")
_lock: Final = threading.Lock()


def prepare(pairs: Collection[Pair]) -> None:
    """Fills ``READY`` for these pairs, but for plain copies; see ``asyncload.quant.prepare``."""
    _check(pairs)
    _make_ready([pair for pair in dict.fromkeys(pairs) if native_dtype(pair[0]) is not pair[1]])


def kernel_address(type: GGMLType, dtype: DType) -> int:  # noqa: A002 - the field's name
    """The address of a pair's C function; see ``asyncload.quant.kernel_address``."""
    pair = type, dtype
    _check([pair])
    _make_ready([pair])
    return READY[pair].address


def _check(pairs: Collection[Pair]) -> None:
    for type_, dtype in pairs:
        if not can_decode(type_, dtype):
            message = refusal(type_, dtype)
            raise UnsupportedQuantError(message, tensor="", type=type_.name, dtype=str(dtype))


def _make_ready(pairs: Sequence[Pair]) -> None:
    if all(pair in READY for pair in pairs):
        return
    with _lock, yielding():
        from asyncload.quant._compiled import compile_kernel

        cold = _load(pairs)
        if cold and _fill_cache(cold):
            cold = _load(cold)
        if cold:
            _log.warning("compiling %s in this process, which holds its interpreter lock meanwhile", _names(cold))
        for pair in cold:
            READY[pair] = compile_kernel(*pair)


def _load(pairs: Sequence[Pair]) -> list[Pair]:
    """Makes the pairs ready that are in the cache, and returns the others."""
    from asyncload.quant._compiled import load_kernel

    cold: list[Pair] = []
    for pair in pairs:
        if pair in READY:
            continue
        if (kernel := load_kernel(*pair)) is None:
            cold.append(pair)
        else:
            READY[pair] = kernel
    return cold


def _fill_cache(pairs: Sequence[Pair]) -> bool:
    """Compiles into the cache in a subprocess, and says whether that went well."""
    from asyncload.quant._compiled import cache_folder

    return cache_folder() is not None and run_module("asyncload.quant._warm", _names(pairs))


def _names(pairs: Sequence[Pair]) -> list[str]:
    """The pairs as ``_warm`` takes them."""
    return [f"{type_.name}:{dtype}" for type_, dtype in pairs]
