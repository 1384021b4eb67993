"""A position in bytes that are still arriving: the part of the parser that knows no GGUF."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Generator
from typing import Any, Final, TypeVar

from asyncload.errors import FormatError, TruncatedError
from asyncload.gguf._array import MARK_EVERY
from asyncload.gguf._strings import LENGTH, UNITS_OF_A_STRING, skip_strings

__all__ = ["MAX_NAME", "Missing", "Reader", "Steps", "quote"]

T = TypeVar("T")

# A computation that yields the number of bytes (from the file's start) that it cannot go on without.
Steps = Generator[int, None, T]

# A header is kept in memory. Real ones end below 32 MiB; beyond this it is an attack, or no header.
_MAX_HEADER: Final = 256 << 20
MAX_NAME: Final = (1 << 16) - 1  # the format's limit for keys; for tensors there is none but ggml's

# One unit is about the time in which Python passes over a string, 60 ns: a pause each 0.07 ms or so.
_UNITS_BETWEEN_PAUSES: Final = 1024
_STRINGS_AT_ONCE: Final = 256
_BYTES_OF_A_UNIT: Final = 64
_BYTES_CHECKED_AT_ONCE: Final = 64 << 10
_UNITS_OF_A_CHECK: Final = 1024
_BYTES_COPIED_AT_ONCE: Final = 256 << 10
_UNITS_OF_A_COPY: Final = 1024

_ZERO_AND_ONE: Final = b"\0\1"
_QUOTED: Final = 80


class Missing(Exception):  # noqa: N818 - no error: more bytes may come
    """Bytes that are not there yet, as ``Reader.need`` takes them, from ``position`` on."""

    def __init__(self, position: int, nbytes: int, what: str, at: int | None = None) -> None:
        self.position = position
        self.announced = nbytes, what, at


class Reader:
    """The bytes of a file as far as they are known, and how far they have been read; ``size`` is the whole file's."""

    def __init__(self, size: int, *, url: str | None, pause: Callable[[], None] | None) -> None:
        self.size = size
        self.url = url
        self.buffer = bytearray()
        self.position = 0
        self._pause = pause
        self._units = 0

    def work(self, units: int) -> None:
        """Counts work done, and pauses where it is time to."""
        self._units += units
        if self._units >= _UNITS_BETWEEN_PAUSES:
            self._units = 0
            if self._pause is not None:
                self._pause()

    def append(self, data: memoryview) -> None:
        """Takes the next bytes of the file, up to its size, and no more than a header may have."""
        data = data[: min(self.size, _MAX_HEADER) - len(self.buffer)]
        for at in range(0, len(data), _BYTES_COPIED_AT_ONCE):
            piece = data[at : at + _BYTES_COPIED_AT_ONCE]
            self.buffer += piece
            self.work(_UNITS_OF_A_COPY * len(piece) // _BYTES_COPIED_AT_ONCE)

    def error(self, message: str, offset: int) -> FormatError:
        """A ``FormatError`` about this file."""
        return FormatError(message, offset=offset, url=self.url)

    def truncated(self, message: str, offset: int) -> TruncatedError:
        """A ``TruncatedError`` about this file."""
        return TruncatedError(message, offset=offset, url=self.url)

    def need(self, nbytes: int, what: str, at: int | None = None) -> Steps[None]:
        """Waits until ``nbytes`` bytes from the position on are there; ``at`` is where they were announced.

        Raises ``TruncatedError`` if the file is too short for them, ``FormatError`` if no header is that long.
        """
        end = self.position + nbytes
        if end > self.size or end > _MAX_HEADER:
            where: int = self.position if at is None else at
            if end > self.size:
                raise self.truncated(f"{what} ({nbytes} bytes) reaches past the end of the file", where)
            raise self.error(f"{what} ({nbytes} bytes) makes the header larger than {_MAX_HEADER} bytes", where)
        while len(self.buffer) < end:
            yield end

    def take(self, layout: struct.Struct, what: str) -> Steps[tuple[Any, ...]]:
        """Reads numbers."""
        return (yield from self.retry(self.numbers_at, layout, what))

    def string(self, what: str, limit: int = _MAX_HEADER) -> Steps[str]:
        """Reads a string of at most ``limit`` bytes."""
        return (yield from self.retry(self.string_at, what, limit))

    def name(self, what: str, limit: int) -> Steps[str]:
        """Reads a string that names something."""
        return (yield from self.retry(self.name_at, what, limit))

    def retry(self, read: Callable[..., tuple[T, int]], *arguments: Any) -> Steps[T]:
        """Reads something with a function that is told the position, and returns what is there and the next one.

        It is called again, from the same position, when what it says to be ``Missing`` has come.
        """
        start = self.position
        while True:
            try:
                value, self.position = read(start, *arguments)
            except Missing as error:
                missing = error.position, error.announced  # what is raised next has nothing to do with it
            else:
                return value
            self.position, announced = missing
            yield from self.need(*announced)
            self.position = start

    def numbers_at(self, at: int, layout: struct.Struct, what: str) -> tuple[tuple[Any, ...], int]:
        """Numbers, and where they end; raises ``Missing``."""
        end = at + layout.size
        if end > len(self.buffer):
            raise Missing(at, layout.size, what)
        return layout.unpack_from(self.buffer, at), end

    def string_at(self, at: int, what: str, limit: int) -> tuple[str, int]:
        """A string of at most ``limit`` bytes, and where it ends; raises ``Missing``."""
        buffer = self.buffer
        (length,), start = self.numbers_at(at, LENGTH, f"{what}'s length")
        if length > limit and length <= self.size - start:
            raise self.error(f"{what} of {length} bytes is longer than {limit}", at)
        end = start + length
        if end > len(buffer):
            raise Missing(start, length, what, at)
        try:
            return buffer[start:end].decode(), end
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8: {error.reason}", start + error.start) from None

    def name_at(self, at: int, what: str, limit: int) -> tuple[str, int]:
        """A string that is not empty, without NUL (where a C reader would see it end); raises ``Missing``."""
        text, end = self.string_at(at, what, limit)
        if not text:
            raise self.error(f"{what} is empty", at)
        if "\0" in text:
            raise self.error(f"{what} {quote(text)} has a NUL in it", at)
        return text, end

    def skip_strings(self, count: int, at: int) -> Steps[array[int]]:
        """Passes over ``count`` strings; returns the position of every ``MARK_EVERY``-th.

        ``at`` is where the count stands; it is held against the file's size, as each string has a length at least.
        """
        if count * LENGTH.size > self.size - self.position:
            raise self.truncated(f"{count} strings do not fit in the file", at)
        marks = array("Q")
        passed = 0
        while passed < count:
            yield from self.need(LENGTH.size, "a string's length")
            most = min(_STRINGS_AT_ONCE, count - passed)
            start = self.position
            done, self.position, last, marked = skip_strings(self.buffer, start, passed, most, MARK_EVERY)
            if self.position > self.size:
                raise self.truncated("a string in an array reaches past the end of the file", last)
            marks.frombytes(marked)
            passed += done
            nbytes = min(self.position, len(self.buffer)) - start  # long strings lie in pages that few have touched
            self.work(max(int(done * UNITS_OF_A_STRING), nbytes // _BYTES_OF_A_UNIT))
        yield from self.need(0, "an array of strings")
        return marks

    def check_bools(self, start: int, count: int) -> None:
        """Raises ``FormatError`` unless ``count`` bytes from ``start`` on are all 0 or 1."""
        for at in range(start, start + count, _BYTES_CHECKED_AT_ONCE):
            piece = self.buffer[at : min(at + _BYTES_CHECKED_AT_ONCE, start + count)]
            if wrong := piece.translate(None, _ZERO_AND_ONE):
                raise self.error(f"a bool is {wrong[0]}, neither 0 nor 1", at + piece.index(wrong[0]))
            self.work(_UNITS_OF_A_CHECK * len(piece) // _BYTES_CHECKED_AT_ONCE)


def quote(text: str) -> str:
    """A name as it can stand in a message: quoted, escaped, and not too long."""
    return repr(text) if len(text) <= _QUOTED else f"{text[:_QUOTED]!r}…"
