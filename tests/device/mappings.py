"""What of the process's address space is mapped."""

from __future__ import annotations

from pathlib import Path

__all__ = ["mapped"]


def mapped(address: int) -> bool:
    """Whether a byte is there."""
    with Path("/proc/self/maps").open() as maps:
        ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
    return any(begin <= address < end for begin, end in ranges)
