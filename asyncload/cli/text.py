"""Text for people: tables, sizes and names that cannot upset a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["plain", "table"]


def plain(text: str) -> str:
    """The text on one line with what is not printable escaped: names in a file may hold terminal sequences."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def table(rows: Iterable[Sequence[object]], *, align: str) -> str:
    """Rows as text in columns; ``align`` has one of ``<`` and ``>`` for each column."""
    cells = [[plain(str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)).rstrip()
        for row in cells
    )
