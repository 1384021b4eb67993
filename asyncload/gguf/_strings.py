"""Passing over the strings of an array, of which a vocabulary has hundreds of thousands: in C++ where it is built."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable
from typing import Final

__all__ = ["LENGTH", "UNITS_OF_A_STRING", "Skipped", "skip_strings", "skip_strings_in_python"]

LENGTH: Final = struct.Struct("<Q")  # of a string, before its bytes

# How many strings were passed over; the position behind the last of them, beyond the buffer if that is not all there;
# the last one's own; and the positions of those whose index is a multiple of ``every``, as 64-bit numbers.
Skipped = tuple[int, int, int, bytes]


def skip_strings_in_python(buffer: bytearray, position: int, first: int, count: int, every: int) -> Skipped:
    """Passes over at most ``count`` strings from a position on, as long as their lengths are there.

    The first of them has the index ``first``.
    """
    marks = array("Q")
    length_at, room = LENGTH.unpack_from, len(buffer) - LENGTH.size
    last, index = position, first
    while index < first + count and position <= room:
        if index % every == 0:
            marks.append(position)
        for _ in range(min(every - index % every, first + count - index)):
            if position > room:  # the next length is not there yet
                break
            last = position
            position += 8 + length_at(buffer, position)[0]
            index += 1
    return index - first, position, last, marks.tobytes()


_in_cpp: Callable[[bytearray, int, int, int, int], Skipped] | None
try:
    from asyncload_native import skip_strings as _in_cpp
except ImportError:
    _in_cpp = None

skip_strings: Final = _in_cpp or skip_strings_in_python
UNITS_OF_A_STRING: Final = 0.125 if _in_cpp else 1.0
