"""Machine code for a pair of type and dtype: from Numba's cache on disk, or from its compiler."""

from __future__ import annotations

import fcntl
import logging
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import numba.core.event

from asyncload.gguf import GGMLType
from asyncload.quant import DType
from asyncload.quant._kernels import KERNEL, signature

__all__ = ["Kernel", "cache_folder", "compile_kernel", "load_kernel"]

_log: Final = logging.getLogger("asyncload.quant")
_event: Any = numba.core.event  # it carries no types


class Kernel(NamedTuple):
    """The ways into a pair's machine code, which stays where it is: Numba forgets nothing that it has loaded.

    ``call`` is the interpreter's, which releases its lock, and ``address`` that of the C function. Both take the
    addresses of source and target and the number of blocks.
    """

    call: Callable[[int, int, int], int]
    address: int


class _NotCachedError(Exception):
    """The cache has no code for a pair."""


class _Refusal(_event.Listener):  # type: ignore[misc]
    """Stops Numba between its look into the cache and its compiler."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def on_start(self, event: Any) -> None:
        """Refuses to compile the kernel on the thread that made this listener."""
        if event.data["dispatcher"] is KERNEL and threading.get_ident() == self._thread:
            raise _NotCachedError

    def on_end(self, event: Any) -> None:
        """Nothing: the end of what was refused, or of what others compile."""


def cache_folder() -> Path | None:
    """Where the kernels' machine code is kept, or None where no folder can be written to."""
    path = KERNEL.stats.cache_path
    return Path(path) if path else None


def load_kernel(type: GGMLType, dtype: DType) -> Kernel | None:  # noqa: A002 - the field's name
    """Loads a pair's machine code from the cache, and never compiles; None where the cache does not have it."""
    wanted = signature(type, dtype)
    try:
        with _event.install_listener("numba:compile", _Refusal()):
            KERNEL.compile(wanted)
    except _NotCachedError:
        return None
    except Exception:  # noqa: BLE001 - whatever the unpickling of a damaged file raises
        _log.warning("the cache of compiled kernels in %s cannot be read and is begun anew", cache_folder())
    if wanted not in KERNEL.overloads:  # damaged, or another version's, left by a process that died
        _begin_anew()
        return None
    return _loaded(wanted)


def compile_kernel(type: GGMLType, dtype: DType) -> Kernel:  # noqa: A002
    """Compiles a pair's machine code unless the cache has it, and stores it there if that can be done."""
    wanted = signature(type, dtype)
    with _locked_cache():
        if (kernel := load_kernel(type, dtype)) is not None:
            return kernel
        try:
            KERNEL.compile(wanted)
        except OSError as error:  # from the cache: the compiler touches no file
            _log.warning("compiled kernels cannot be kept in %s: %s", cache_folder(), error)
            KERNEL._cache.disable()  # noqa: SLF001 - Numba has no public way
            KERNEL.compile(wanted)
        return _loaded(wanted)


def _loaded(wanted: tuple[Any, ...]) -> Kernel:
    code = KERNEL.overloads[wanted]
    return Kernel(code.entry_point, code.library.get_pointer_to_function(code.fndesc.llvm_cfunc_wrapper_name))


def _begin_anew() -> None:
    """Empties the cache's index, so that what it named is written again, or does without the cache."""
    try:
        KERNEL._cache.flush()  # noqa: SLF001 - what `KERNEL.recompile` does, without compiling
    except OSError:
        KERNEL._cache.disable()  # noqa: SLF001


@contextmanager
def _locked_cache() -> Generator[None]:
    """Holds other processes off the cache: after two writers at once, its index can name one's code as the other's."""
    with ExitStack() as stack:
        folder = cache_folder()
        if folder is not None:
            with suppress(OSError):  # a folder that cannot be written to needs no lock
                file = stack.enter_context((folder / "asyncload.lock").open("w"))
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
