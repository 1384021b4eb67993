"""Giving memory back piece by piece."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.native

PAGE = mmap.PAGESIZE
PIECE = 4 << 20
WHOLE = 6 * PIECE
LIBC = ctypes.CDLL(None)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]


@pytest.fixture
def maps() -> Iterator[Callable[[], bytes]]:
    """Reads which memory is mapped into memory that is there: what is new might take the place of what has gone."""
    buffer = memoryview(bytearray(4 << 20))
    with Path("/proc/self/maps").open("rb", buffering=0) as file:

        def read() -> bytes:
            at = 0
            os.lseek(file.fileno(), 0, os.SEEK_SET)
            while count := os.readv(file.fileno(), [buffer[at:]]):
                at += count
            return bytes(buffer[:at])

        yield read


def map_memory(nbytes: int) -> int:
    """The address of so many bytes."""
    address: int = LIBC.mmap(
        None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
    )
    return address


def mapped(maps: bytes, begin: int, end: int) -> int:
    """How many bytes between two addresses are mapped."""
    count = 0
    for line in maps.splitlines():
        low, high = (int(address, 16) for address in line.split()[0].split(b"-"))
        count += max(0, min(high, end) - max(low, begin))
    return count


@pytest.mark.parametrize("first", [0, PAGE, PIECE - PAGE])
@pytest.mark.parametrize("nbytes", [1, PAGE, PIECE, PIECE + 1, 3 * PIECE, 3 * PIECE - PAGE + 1])
def test_it_takes_what_it_is_told_and_nothing_beside(maps: Callable[[], bytes], first: int, nbytes: int) -> None:
    from asyncload_native import unmap

    address = map_memory(WHOLE)
    base = -(-address // PIECE) * PIECE + PIECE + first  # with some of the mapping on either side
    behind = base + -(-nbytes // PAGE) * PAGE
    unmap(base, nbytes)
    found = maps()
    unmap(address, base - address)
    unmap(behind, address + WHOLE - behind)
    assert mapped(found, base, behind) == 0
    assert mapped(found, base - PAGE, base) == PAGE
    assert mapped(found, behind, behind + PAGE) == PAGE


def test_it_sleeps_between_pieces_so_that_others_may_map_memory() -> None:
    from asyncload_native import unmap

    nbytes = 4 * WHOLE
    address = map_memory(nbytes)
    LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), mmap.MADV_NOHUGEPAGE)
    ctypes.memset(address, 1, nbytes)  # each page is there, and giving that many back takes its time
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
    unmap(address, nbytes)
    assert resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw >= before + 2
