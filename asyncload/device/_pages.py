"""Pages of host memory in a mapping of their own, which goes back to the system when it is closed."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final

__all__ = ["Pages"]

_HUGE_PAGE: Final = 2 << 20
_TOUCHING_THREADS: Final = 8
_MAP_FAILED: Final = ctypes.c_void_p(-1).value

_libc: Final = ctypes.CDLL(None, use_errno=True)  # its calls release the interpreter lock
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

_unmap: Callable[[int, int], object]
try:
    from asyncload_native import unmap as _unmap  # makes way for an event loop on the same cores
except ImportError:
    _unmap = _libc.munmap


class Pages:
    """``nbytes`` zero bytes from ``address`` on, aligned to a page, in huge pages where the system has them.

    Raises ``MemoryError`` if there is no address space or memory for them.
    """

    __slots__ = ("address", "nbytes", "view")

    def __init__(self, nbytes: int) -> None:
        length = max(nbytes, 1)
        if length > sys.maxsize:
            raise MemoryError(f"the system has no {nbytes} bytes: more than an address can count")
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        address = _libc.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        if address in {None, _MAP_FAILED}:
            raise MemoryError(f"the system has no {nbytes} bytes: {os.strerror(ctypes.get_errno())}")
        if nbytes >= _HUGE_PAGE:
            _libc.madvise(address, length, mmap.MADV_HUGEPAGE)  # a kernel without them refuses, and that is fine
        # What all views stand on: when the last of them goes, so do the pages. Python's own mmap unmaps with the
        # interpreter lock held, which for a few hundred megabytes takes longer than an event loop may wait.
        array = (ctypes.c_char * length).from_address(address)
        finalizer = weakref.finalize(array, _unmap, address, length)
        finalizer.atexit = False
        self.nbytes = nbytes
        self.address = address
        self.view = memoryview(array).cast("B")[:nbytes]

    def touch(self) -> None:
        """Has the system fill in the pages now, on several threads: one alone is bound by the kernel's clearing."""
        threads = min(_TOUCHING_THREADS, len(os.sched_getaffinity(0)), 1 + self.nbytes // _HUGE_PAGE)
        step = -(-self.nbytes // threads // _HUGE_PAGE) * _HUGE_PAGE  # no two threads fault in the same huge page
        with ThreadPoolExecutor(threads, thread_name_prefix="asyncload-touch") as executor:
            for begin in range(0, self.nbytes, step or 1):
                executor.submit(self.fill, 0, begin, min(step, self.nbytes - begin))

    def fill(self, byte: int, offset: int, nbytes: int) -> None:
        """Sets each byte of a range; the interpreter lock is free meanwhile."""
        ctypes.memset(self.address + offset, byte, nbytes)

    def close(self) -> None:
        """Unmaps the pages, now or as soon as the last view of them that somebody still holds is gone."""
        with suppress(BufferError):  # somebody has made an array of it
            self.view.release()
