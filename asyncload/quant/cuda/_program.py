"""Compiling, through ``cuda.core`` and its cache of programs, and launching."""

from __future__ import annotations

import ctypes
import logging
import math
import os
from collections.abc import Collection
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any, Final

from asyncload.errors import BackendUnavailableError
from asyncload.gguf import GGMLType
from asyncload.quant import DType
from asyncload.quant.cuda import ALIGNMENT, kernel_name
from asyncload.quant.cuda._source import assemble

__all__ = ["Kernel", "compile_program", "compiler", "load_nvrtc"]

_log: Final = logging.getLogger("asyncload.quant")
_THREADS: Final = 256  # of a block of threads, as the kernels are bounded to
_SPAN: Final = 8192  # weights that a block of threads decodes
_GRID_SPAN: Final = 16384  # the same where it has to fetch a grid of up to 8 KiB before


def compile_program(arch: str, pairs: Collection[tuple[GGMLType, DType]]) -> Any:
    """Compiles; see ``asyncload.quant.cuda.compile_kernels``."""
    text = assemble(pairs)
    try:
        load_nvrtc()
        core: Any = import_module("cuda.core")
        # Products that are not exact are rounded before the sum, as ggml does; the exact ones name their fused sums.
        options = core.ProgramOptions(std="c++17", arch=arch, fma=False)
        kept = _open_cache()
        try:
            return core.Program(text, "c++", options).compile("cubin", **({} if kept is None else {"cache": kept}))
        except OSError as error:  # from the cache: the compiler touches no file
            _log.warning("compiled CUDA kernels cannot be kept: %s", error)
            return core.Program(text, "c++", options).compile("cubin")
    except Exception as error:
        message = f"the decoding kernels cannot be compiled for {arch}: {error}"
        raise BackendUnavailableError(message, device="cuda") from error


@cache
def load_nvrtc() -> None:
    """Loads NVRTC's library without the interpreter lock, which ``cuda.bindings`` would hold for up to 80 ms.

    Where it comes from no package, that is left to ``cuda.bindings``.
    """
    for package in ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"):
        with suppress(PackageNotFoundError):
            for file in files(package) or ():
                if file.name.startswith("libnvrtc.so"):
                    # a call through ctypes gives the lock up, which making a ``CDLL`` does not
                    dlopen = ctypes.CDLL(None).dlopen
                    dlopen.argtypes, dlopen.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
                    dlopen(os.fsencode(file.locate()), os.RTLD_NOW)
                    return


def compiler() -> tuple[str, Path | None]:
    """Asks NVRTC; see ``asyncload.quant.cuda.compiler``."""
    try:
        load_nvrtc()
        _, major, minor = import_module("cuda.bindings.nvrtc").nvrtcVersion()
    except (ImportError, RuntimeError) as error:  # what the bindings raise without the library
        raise BackendUnavailableError(f"there is no NVRTC: {error}", device="cuda") from error
    return f"{major}.{minor}", getattr(_open_cache(), "_root", None)  # cuda.core has no public way


def _open_cache() -> Any:
    """``cuda.core``'s cache on disk, or None where there is no folder for it, no home, or a version without it."""
    try:
        return import_module("cuda.core.utils").FileStreamProgramCache()
    except (OSError, RuntimeError, AttributeError) as error:
        _log.warning("compiled CUDA kernels cannot be kept: %s", error)
        return None


class Kernel:
    """A pair's kernel, loaded into the current context; ``span`` is how many weights a block of threads decodes."""

    def __init__(self, code: Any, type: GGMLType, dtype: DType) -> None:  # noqa: A002 - the field's name
        self._core: Any = import_module("cuda.core")
        self._kernel = code.get_kernel(kernel_name(type, dtype))
        self._block_size = type.block_size
        self.span = _GRID_SPAN if type.name.startswith(("IQ1", "IQ2", "IQ3")) else _SPAN
        self._alignment = ALIGNMENT if type.quantized else dtype.itemsize
        self.handle = _load(self._kernel)  #: the ``CUfunction``'s address
        self.blocks_per_group = self.span // type.block_size

    @property
    def registers(self) -> int:
        """How many registers a thread takes."""
        return int(self._kernel.attributes.num_regs)

    def launch(self, stream: Any, source_address: int, target_address: int, n_blocks: int) -> None:
        """Enqueues the decoding of ``n_blocks`` blocks (weights, where the type has no blocks) on a stream.

        ``stream`` is any object with ``__cuda_stream__``, of the current context. The source may have any address; the
        aligned words of four bytes around its ends are read whole. The target's address is a multiple of 16, or, where
        the type has no blocks, of the weight's size; otherwise ``ValueError`` is raised. Nothing outside the target is
        written.
        """
        if target_address % self._alignment:
            raise ValueError(f"the target's address {target_address:#x} is no multiple of {self._alignment}")
        if n_blocks:
            grid = math.ceil(n_blocks * self._block_size / self.span)
            config = self._core.LaunchConfig(grid=grid, block=_THREADS)
            stream = self._core.Stream.from_handle(stream.__cuda_stream__()[1])
            self._core.launch(stream, config, self._kernel, source_address, target_address, n_blocks)


def _load(kernel: Any) -> int:
    """Brings a kernel onto the device: else its first launch does, and waits there for whatever runs.

    Returns the function's address.
    """
    driver = import_module("cuda.bindings.driver")
    code, function = driver.cuKernelGetFunction(kernel.handle)
    with suppress(RuntimeError):  # a driver older than cuFuncLoad (CUDA 12.4)
        code = code if int(code) != 0 else driver.cuFuncLoad(function)[0]
    if int(code) != 0:
        raise BackendUnavailableError(f"a decoding kernel cannot be loaded: {code.name}", device="cuda", code=code.name)
    return int(function)
