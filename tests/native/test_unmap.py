"""Giving memory back piece by piece."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from asyncload.device._pages import Pages

pytestmark = pytest.mark.native

PAGE = mmap.PAGESIZE
PIECE = 4 << 20


def mapped(begin: int, end: int) -> int:
    """How many bytes between two addresses are mapped."""
    count = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(address, 16) for address in line.split()[0].split("-"))
        count += max(0, min(high, end) - max(low, begin))
    return count


@pytest.mark.parametrize("first", [0, PAGE, PIECE - PAGE])
@pytest.mark.parametrize("nbytes", [1, PAGE, PIECE, PIECE + 1, 3 * PIECE, 3 * PIECE - PAGE + 1])
def test_it_takes_what_it_is_told_and_nothing_beside(first: int, nbytes: int) -> None:
    from asyncload_native import unmap

    whole = -(-nbytes // PAGE) * PAGE
    pages = Pages(6 * PIECE)
    base = -(-pages.address // PIECE) * PIECE + PIECE + first  # with some of the mapping on either side
    unmap(base, nbytes)
    try:
        assert mapped(base, base + whole) == 0
        assert mapped(base - PAGE, base) == PAGE
        assert mapped(base + whole, base + whole + PAGE) == PAGE
    finally:
        pages.close()
