"""Pages of host memory: mapped alone and together, and unmapped when nobody looks any more."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from itertools import pairwise

import pytest

from asyncload.device import HostDevice, _pages
from asyncload.device._pages import Mapping, Pages, unmap
from asyncload.errors import DeviceError
from tests.device.mappings import mapped


def test_pages_are_unmapped_when_they_are_closed_and_nobody_looks() -> None:
    pages = Pages(5 << 20)
    assert mapped(pages.address + (5 << 20) - 1)
    pages.touch()
    assert bytes(pages.view[-16:]) == bytes(16)
    part = pages.view[:16]
    pages.close()
    assert mapped(pages.address)
    part.release()
    pages.close()
    assert not mapped(pages.address)


def test_a_mapping_is_taken_and_unmapped_piece_by_piece() -> None:
    page, sizes = mmap.PAGESIZE, [1, mmap.PAGESIZE, 3 << 20, mmap.PAGESIZE + 1]
    mapping = Mapping([*sizes, 5 * page])
    pieces = [(mapping.take(nbytes), nbytes) for nbytes in sizes]
    rest = pieces[-1][0] + 2 * page
    assert [following - address for (address, _), (following, _) in pairwise(pieces)] == [page, page, 3 << 20]
    assert [mapped(rest), mapped(rest + 5 * page - 1)] == [True, True]
    mapping.close()
    mapping.close()
    assert [mapped(rest), mapped(rest + 5 * page - 1)] == [False, False]
    for address, nbytes in pieces:
        ctypes.memset(address, 1, nbytes)
    for unmapped in (2, 0, 3, 1):
        address, nbytes = pieces[unmapped]
        assert ctypes.string_at(address + nbytes - 1, 1) == b"\1"
        unmap([pieces[unmapped]])
        assert [mapped(address), mapped(address + nbytes - 1)] == [False, False]


def test_neighbours_are_unmapped_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    page, calls = mmap.PAGESIZE, list[tuple[int, int]]()

    def note(address: int, nbytes: int) -> None:
        calls.append((address, nbytes))

    monkeypatch.setattr(_pages, "_unmap", note)
    base = 1 << 40
    unmap(
        [(base + 4 * page, page), (base + page, 1), (base, page), (base + 2 * page, 2 * page - 1), (base + 6 * page, 5)]
    )
    assert calls == [(base, 5 * page), (base + 6 * page, page)]
    unmap([])
    unmap([(0, 0), (base, 0)])
    assert len(calls) == 2


WITHOUT_NATIVE = """
import sys
sys.modules["asyncload_native"] = None
from asyncload.device import _pages
calls, munmap = [], _pages._libc.munmap
_pages._libc.munmap = lambda address, nbytes: (calls.append((address, nbytes)), munmap(address, nbytes))
mapping = _pages.Mapping([9 << 20])
address = mapping.take(9 << 20)
_pages.unmap([(address, 9 << 20)])
assert sum(nbytes for _, nbytes in calls) == 9 << 20 and calls[0][0] == address, calls
assert all(begin + nbytes == following for (begin, nbytes), (following, _) in zip(calls, calls[1:])), calls
assert all(begin % (4 << 20) == 0 for begin, _ in calls[1:]) and len(calls) in (3, 4), calls
assert not any(line.startswith(f"{address:x}-") for line in open("/proc/self/maps"))
"""


def test_without_the_extension_memory_is_unmapped_piece_by_piece() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_NATIVE], check=True, timeout=60)


def test_a_mapping_that_was_too_small_or_too_large_gives_what_there_is() -> None:
    none = Mapping([])
    address = none.take(5)
    none.close()
    assert mapped(address)
    unmap([(address, 5)])
    assert not mapped(address)
    large = Mapping([mmap.PAGESIZE, 1 << 60])
    address = large.take(5)
    with pytest.raises(MemoryError):
        large.take(1 << 60)
    large.close()
    assert mapped(address)
    unmap([(address, 5)])


def test_pages_under_an_array_stay_with_it() -> None:
    pages = Pages(4096)
    address = pages.address
    array = (ctypes.c_char * 4096).from_buffer(pages.view)
    pages.close()
    del pages
    assert array[0] == b"\0"
    del array
    assert not mapped(address)


def test_there_is_an_end_to_address_space() -> None:
    for nbytes in (1 << 60, 1 << 70):
        with pytest.raises(MemoryError):
            Pages(nbytes)
    with pytest.raises(DeviceError, match="no staging memory"):
        HostDevice().staging(1 << 60)
