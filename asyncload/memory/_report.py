"""The ledger for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from asyncload.memory._ledger import Entry, Purpose
from asyncload.options import format_size

__all__ = ["bytes_by_purpose", "format_report"]

_LARGEST = 5  # allocations that a report names


def bytes_by_purpose(entries: Iterable[Entry]) -> dict[Purpose, int]:
    """Bytes for each purpose that has any."""
    sizes = dict.fromkeys(Purpose, 0)
    for entry in entries:
        sizes[entry.purpose] += entry.memory.nbytes
    return {purpose: size for purpose, size in sizes.items() if size}


def format_report(device: str, entries: Sequence[Entry]) -> str:
    """A table: bytes and lines by purpose, in all, and how much of that was registered; then the largest lines."""
    counts = Counter(entry.purpose for entry in entries)
    rows = [(str(purpose), size, counts[purpose]) for purpose, size in bytes_by_purpose(entries).items()]
    rows.append(("total", _total(entries), len(entries)))
    registered = [entry for entry in entries if entry.registered]
    if registered:
        rows.append(("registered", _total(registered), len(registered)))
    lines = [f"{device:<12}{'size':>12}{'allocations':>14}"]
    lines += [f"{name:<12}{format_size(size):>12}{count:>14}" for name, size, count in rows]
    if entries:
        lines.append("largest:")
    for entry in sorted(entries, key=lambda entry: entry.memory.nbytes, reverse=True)[:_LARGEST]:
        mark = " (registered)" if entry.registered else ""
        lines.append(f"{format_size(entry.memory.nbytes):>24}  {entry.description}{mark}")
    return "\n".join(lines)


def _total(entries: Iterable[Entry]) -> int:
    return sum(entry.memory.nbytes for entry in entries)
