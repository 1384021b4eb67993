"""The lines of the ledger: ranges of device memory, no two of which overlap."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from asyncload.device import DeviceMemory
from asyncload.errors import LedgerError

__all__ = ["Entry", "Ledger", "Purpose"]


class Purpose(StrEnum):
    """What device memory is for."""

    WEIGHTS = "weights"
    SLOTS = "slots"
    SCRATCH = "scratch"
    KV_CACHE = "kv_cache"
    WORKSPACE = "workspace"
    UNKNOWN = "unknown"


@dataclass(frozen=True, eq=False, slots=True)
class Entry:
    """A line of the ledger: memory that the tracker has allocated, or that somebody else has and registered."""

    memory: DeviceMemory
    purpose: Purpose
    description: str
    registered: bool = False

    def __str__(self) -> str:
        return f"{self.description!r} ({self.purpose}, {self.memory.nbytes} bytes at {self.memory.address:#x})"


class Ledger:
    """Lines by address, none of them empty; whoever shares it among threads locks it."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._entries: dict[int, Entry] = {}  # by address
        self._addresses: list[int] = []  # sorted

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __contains__(self, entry: Entry) -> bool:
        return self._entries.get(entry.memory.address) is entry

    def overlapping(self, memory: DeviceMemory) -> Entry | None:
        """A line whose range has bytes in common with a range, if there is one."""
        following = bisect_left(self._addresses, memory.address + memory.nbytes)
        if following == 0:
            return None
        # Lines do not overlap, so of those that begin before the range's end the last also ends last.
        last = self._entries[self._addresses[following - 1]]
        return last if last.memory.address + last.memory.nbytes > memory.address else None

    def add(self, entry: Entry) -> None:
        """Adds a line; raises ``LedgerError`` if its range overlaps another's."""
        other = self.overlapping(entry.memory)
        if other is not None:
            raise self.overlap(entry, other)
        address = entry.memory.address
        self._addresses.insert(bisect_left(self._addresses, address), address)
        self._entries[address] = entry

    def overlap(self, entry: Entry, other: Entry) -> LedgerError:
        """The error that a line cannot be added because of another."""
        return self._error(f"{entry} cannot be recorded where the ledger holds {other}", entry)

    def remove(self, entry: Entry) -> None:
        """Strikes a line out; raises ``LedgerError`` unless it is there."""
        if entry not in self:
            raise self._error(f"{entry} is not in the ledger", entry)
        address = entry.memory.address
        del self._entries[address]
        del self._addresses[bisect_left(self._addresses, address)]

    def _error(self, message: str, entry: Entry) -> LedgerError:
        return LedgerError(
            f"{self._device}: {message}",
            device=self._device,
            address=entry.memory.address,
            nbytes=entry.memory.nbytes,
        )
