"""Pages of host memory, which go back to the system when they are closed."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final

__all__ = ["Mapping", "Pages", "unmap"]

_HUGE_PAGE: Final = 2 << 20
_TOUCHING_THREADS: Final = 8
_PIECE: Final = 4 << 20  # bytes that are unmapped in one call, at most
_MAP_FAILED: Final = ctypes.c_void_p(-1).value

_libc: Final = ctypes.CDLL(None, use_errno=True)  # its calls release the interpreter lock
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _unmap_pieces(address: int, nbytes: int) -> None:
    for begin in range(address - address % _PIECE, address + nbytes, _PIECE):
        first, end = max(begin, address), min(begin + _PIECE, address + nbytes)
        _libc.munmap(first, end - first)


_unmap: Callable[[int, int], object]
try:
    from asyncload_native import unmap as _unmap  # makes way for who maps memory meanwhile, and for an event loop
except ImportError:
    _unmap = _unmap_pieces


class Pages:
    """``nbytes`` zero bytes from ``address`` on, aligned to a page, in huge pages where the system has them.

    Raises ``MemoryError`` if there is no address space or memory for them.
    """

    __slots__ = ("address", "nbytes", "view")

    def __init__(self, nbytes: int) -> None:
        length = max(nbytes, 1)
        self.nbytes = nbytes
        self.address = _map(length)
        # What all views stand on: when the last of them goes, so do the pages. Python's own mmap unmaps with the
        # interpreter lock held, which for a few hundred megabytes takes longer than an event loop may wait.
        array = (ctypes.c_char * length).from_address(self.address)
        finalizer = weakref.finalize(array, _unmap, self.address, length)
        finalizer.atexit = False
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


class Mapping:
    """Zero bytes for several, mapped at once: ``take`` gives each pages of its own, and ``close`` gives back the rest.

    A call of the system's for each would wait for all threads that fill in pages at that moment, again and again. It is
    not thread-safe.
    """

    def __init__(self, sizes: Iterable[int] = ()) -> None:
        self._begin = self._end = 0
        nbytes = sum(map(_whole_pages, sizes))
        with suppress(MemoryError):  # what is too much at once may be there one by one
            if nbytes:
                self._begin = _map(nbytes)
                self._end = self._begin + nbytes

    def take(self, nbytes: int) -> int:
        """The address of ``nbytes`` (not zero), which the caller unmaps; raises ``MemoryError`` if there are none."""
        length = _whole_pages(nbytes)
        if length > self._end - self._begin:
            return _map(length)
        address = self._begin
        self._begin += length
        return address

    def close(self) -> None:
        """Unmaps what nobody has taken."""
        unmap([(self._begin, self._end - self._begin)])
        self._begin = self._end


def unmap(ranges: Iterable[tuple[int, int]]) -> None:
    """Unmaps ranges, each an address and a number of bytes; those side by side in one call.

    A call for each asks for the interpreter lock each time, beside whoever does so at that moment.
    """
    begin = end = 0
    for address, nbytes in [*sorted(ranges), (0, 0)]:
        if address != end:
            if begin < end:
                _unmap(begin, end - begin)
            begin = address
        end = address + _whole_pages(nbytes)


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _map(nbytes: int) -> int:
    if nbytes > sys.maxsize:
        raise MemoryError(f"the system has no {nbytes} bytes: more than an address can count")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address: int | None = _libc.mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if address is None or address == _MAP_FAILED:
        raise MemoryError(f"the system has no {nbytes} bytes: {os.strerror(ctypes.get_errno())}")
    if nbytes >= _HUGE_PAGE:
        _libc.madvise(address, nbytes, mmap.MADV_HUGEPAGE)  # a kernel without them refuses, and that is fine
    return address
