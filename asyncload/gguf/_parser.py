"""The grammar of a GGUF header, over bytes that arrive piece by piece."""

from __future__ import annotations

import struct
from collections.abc import Callable
from types import MappingProxyType
from typing import Final

from asyncload.gguf._header import Header
from asyncload.gguf._metadata import SMALLEST_PAIR, read_metadata
from asyncload.gguf._reader import Reader, Steps
from asyncload.gguf._tensors import SMALLEST_ENTRY, place, read_entries

__all__ = ["HeaderParser"]

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_UINT32: Final = struct.Struct("<I")
_COUNTS: Final = struct.Struct("<qq")

# Beyond this no real model goes; it keeps what a hostile file costs in memory small.
_MAX_ENTRIES: Final = 1 << 20


class HeaderParser:
    """Turns the first bytes of a GGUF file of ``size`` bytes into a ``Header``, however they are cut in pieces.

    Feed it the file from its start until ``header`` is not None. It is lenient where real writers differ (gaps
    between tensors, their order, bytes after the last one); ``strict`` accepts only what ggml itself does. It reads
    versions 2 and 3, little endian. ``pause`` is called each 0.07 ms or so of work: a thread that gives up the
    interpreter lock in it leaves the event loop its time.
    """

    def __init__(
        self, size: int, *, strict: bool = False, url: str | None = None, pause: Callable[[], None] | None = None
    ) -> None:
        self._reader = Reader(size, url=url, pause=pause)
        self._strict = strict
        self._steps: Steps[Header] | None = self._parse()
        self._needed = min(size, len(_MAGIC) + _UINT32.size + _COUNTS.size)
        self._header: Header | None = None
        self._error: BaseException | None = None

    @property
    def needed(self) -> int:
        """The bytes, counted from the file's start, without which it cannot go on; never more than the file has."""
        return self._needed

    @property
    def header(self) -> Header | None:
        """The header, once all of it has been fed."""
        return self._header

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Takes the next bytes of the file; those after the header are ignored.

        Raises ``FormatError`` (``TruncatedError``, ``UnsupportedTypeError``), and the same again if fed once more.
        """
        if self._error is not None:
            raise self._error
        if self._steps is None:
            return
        reader = self._reader
        try:
            reader.append(memoryview(data))
            if len(reader.buffer) >= self._needed:
                self._needed = next(self._steps)
        except StopIteration as stop:
            self._header = stop.value
            self._steps = None
        except BaseException as error:
            self._error = error
            self._steps = None
            reader.buffer.clear()
            raise

    def _parse(self) -> Steps[Header]:
        reader = self._reader
        version, n_tensors, n_pairs = yield from self._preamble()
        metadata, alignment = yield from read_metadata(reader, n_pairs)
        entries = yield from read_entries(reader, n_tensors, strict=self._strict)
        del reader.buffer[reader.position :]
        data_offset = reader.position
        if n_tensors:
            data_offset += -data_offset % alignment
            if data_offset > reader.size:
                raise reader.truncated("the file ends before the data of its tensors", reader.position)
        tensors, nbytes = place(entries, reader, data_offset=data_offset, alignment=alignment, strict=self._strict)
        return Header(
            version=version,
            alignment=alignment,
            metadata=MappingProxyType(metadata),
            tensors=MappingProxyType(tensors),
            data_offset=data_offset,
            nbytes=nbytes,
        )

    def _preamble(self) -> Steps[tuple[int, int, int]]:
        """Reads the version and the numbers of tensors and of metadata keys."""
        reader = self._reader
        yield from reader.need(len(_MAGIC), "the magic number")
        if (magic := bytes(reader.buffer[: len(_MAGIC)])) != _MAGIC:
            raise reader.error(f"no GGUF file: it begins with {magic!r}, not {_MAGIC!r}", 0)
        reader.position += len(_MAGIC)
        at = reader.position
        (version,) = yield from reader.take(_UINT32, "the version")
        if version not in _VERSIONS:
            if version and version & 0xFFFF == 0:
                swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
                raise reader.error(f"big-endian GGUF (version {swapped}): only little-endian files are read", at)
            raise reader.error(f"GGUF version {version}: only versions 2 and 3 are read", at)
        at = reader.position
        n_tensors, n_pairs = yield from reader.take(_COUNTS, "the number of tensors and keys")
        room = reader.size - reader.position
        for count, what, smallest, where in (
            (n_tensors, "tensors", SMALLEST_ENTRY, at),
            (n_pairs, "metadata keys", SMALLEST_PAIR, at + 8),
        ):
            if count < 0:
                raise reader.error(f"the number of {what} is negative ({count})", where)
            if count * smallest > room:
                raise reader.truncated(f"{count} {what} do not fit in a file of {reader.size} bytes", where)
            if count > _MAX_ENTRIES:
                raise reader.error(f"{count} {what} are more than {_MAX_ENTRIES}", where)
        return version, n_tensors, n_pairs
