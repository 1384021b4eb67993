"""Pages of host memory in a mapping of their own, which goes back to the system when it is closed."""

from __future__ import annotations

import ctypes
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

__all__ = ["Pages"]

_libc = ctypes.CDLL(None)
_HUGE_PAGE = 2 << 20
_TOUCHING_THREADS = 8


class Pages:
    """``nbytes`` zero bytes from ``address`` on, aligned to a page, in huge pages where the system has them.

    Raises ``MemoryError`` if there is no address space or memory for them.
    """

    __slots__ = ("_mapping", "address", "nbytes", "view")

    def __init__(self, nbytes: int) -> None:
        try:
            self._mapping = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise MemoryError(f"the system has no {nbytes} bytes: {error}") from error
        if nbytes >= _HUGE_PAGE:
            with suppress(OSError):  # a kernel without them
                self._mapping.madvise(mmap.MADV_HUGEPAGE)
        self.nbytes = nbytes
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        self.view = memoryview(self._mapping)[:nbytes]

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
        with suppress(BufferError):
            self.view.release()
            # gives the pages back first: closing the mapping would do that with the interpreter lock held
            _libc.madvise(ctypes.c_void_p(self.address), ctypes.c_size_t(self.nbytes), mmap.MADV_DONTNEED)
            self._mapping.close()
