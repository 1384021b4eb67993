"""The lines of the ledger: what overlaps, and what is not there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncload.device import DeviceMemory
from asyncload.errors import DeviceError, LedgerError
from asyncload.memory import Purpose
from asyncload.memory._ledger import Entry, Ledger

SPACE = 64  # addresses, so few that ranges meet


def entry(address: int, nbytes: int, description: str = "a tensor") -> Entry:
    return Entry(DeviceMemory(address, nbytes), Purpose.WEIGHTS, description)


ranges = st.tuples(st.integers(1, SPACE), st.integers(1, SPACE // 4))


@given(st.lists(st.tuples(st.booleans(), ranges), max_size=40))
def test_ranges_meet_when_they_have_a_byte_in_common(steps: list[tuple[bool, tuple[int, int]]]) -> None:
    """Against sets of bytes; a step that removes takes the line that the range meets, if there is one."""
    ledger, held = Ledger("host"), dict[Entry, set[int]]()
    for removes, (address, nbytes) in steps:
        line = entry(address, nbytes)
        covered = set(range(address, address + nbytes))
        meeting = [other for other, bytes_of_other in held.items() if bytes_of_other & covered]
        found = ledger.overlapping(line.memory)
        assert found in meeting if meeting else found is None
        if removes and found is not None:
            ledger.remove(found)
            del held[found]
            assert found not in ledger
        elif found is not None:
            with pytest.raises(LedgerError):
                ledger.add(line)
        else:
            ledger.add(line)
            held[line] = covered
        assert set(ledger) == set(held)
        assert all(line in ledger for line in held)


def test_neighbours_do_not_meet() -> None:
    ledger = Ledger("host")
    for line in (entry(256, 256), entry(512, 256), entry(1, 255)):
        ledger.add(line)
    assert len(list(ledger)) == 3


@pytest.mark.parametrize(
    ("address", "nbytes"), [(256, 256), (256, 1), (255, 2), (511, 1), (511, 4096), (300, 10), (1, 1 << 40)]
)
def test_an_overlap_says_who_holds_what(address: int, nbytes: int) -> None:
    ledger = Ledger("cuda:0")
    ledger.add(entry(256, 256, "blk.0"))
    with pytest.raises(LedgerError, match=r"'blk\.1'.* holds 'blk\.0' \(weights, 256 bytes at 0x100\)") as caught:
        ledger.add(entry(address, nbytes, "blk.1"))
    assert (caught.value.device, caught.value.address, caught.value.nbytes) == ("cuda:0", address, nbytes)
    assert isinstance(caught.value, DeviceError)
    assert [line.description for line in ledger] == ["blk.0"]


def test_what_is_not_there_cannot_be_removed() -> None:
    ledger, line = Ledger("cuda:0"), entry(256, 256)
    ledger.add(line)
    for unknown in (entry(256, 256), entry(512, 256), entry(300, 1)):  # the first is another's at the same address
        with pytest.raises(LedgerError, match="is not in the ledger") as caught:
            ledger.remove(unknown)
        assert (caught.value.address, caught.value.nbytes) == (unknown.memory.address, unknown.memory.nbytes)
    ledger.remove(line)
    with pytest.raises(LedgerError):
        ledger.remove(line)
    ledger.add(entry(256, 256))
