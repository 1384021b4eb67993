"""``python -m bench._bare_reads FILE THREADS NICE``: reads a file again and again, into fresh memory, until it ends.

As much work for the machine as loads to the host are, by as many threads of the same niceness, in a process of its own:
what a ticker beside it is late by, nobody's event loop or interpreter lock has caused. It says "ready" when it has read
the file once.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from collections.abc import Iterator

_PIECE = 4 << 20


def _read(descriptor: int, memory: memoryview, pieces: Iterator[int]) -> None:
    for offset in pieces:  # of all threads: who is ready takes the next
        os.preadv(descriptor, [memory[offset : offset + _PIECE]], offset)


def main(path: str, threads: str, nice: str) -> None:
    os.nice(int(nice))
    descriptor = os.open(path, os.O_RDONLY)
    nbytes, ready = os.fstat(descriptor).st_size, False
    while True:
        pages = mmap.mmap(-1, nbytes)
        pages.madvise(mmap.MADV_HUGEPAGE)
        with memoryview(pages) as memory:
            pieces = iter(range(0, nbytes, _PIECE))
            readers = [threading.Thread(target=_read, args=(descriptor, memory, pieces)) for _ in range(int(threads))]
            for reader in readers:
                reader.start()
            for reader in readers:
                reader.join()
        pages.close()
        if not ready:
            print("ready", flush=True)
            ready = True


if __name__ == "__main__":
    main(*sys.argv[1:])
