"""One file for loaders of GGUF and of safetensors: the same bytes at the same places, in the same pages."""

from __future__ import annotations

import json
import os
from errno import EAGAIN
from pathlib import Path
from typing import Final, Literal

from asyncload.gguf import Header

__all__ = ["Form", "TwoHeaders"]

Form = Literal["gguf", "safetensors"]

_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_STEP: Final = 1 << 20  # bytes of the file for each that is looked at
_PREFIX: Final = 8  # bytes, of the length with which a safetensors file begins


class TwoHeaders:
    """A GGUF model whose first bytes are now its own header, now one of safetensors, blocks as plain bytes.

    The header of safetensors is filled up with blanks to the other's length; raises ``ValueError`` if it is longer.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self.header = header
        with path.open("rb") as file:
            gguf = file.read(header.data_offset)
        self._headers: dict[Form, bytes] = {"gguf": gguf, "safetensors": self._safetensors()}
        self._form: Form = "gguf"

    def _safetensors(self) -> bytes:
        entries: dict[str, dict[str, object]] = {}
        begin = self.header.data_offset
        end = at = begin

        def add(name: str, until: int) -> None:
            entries[name] = {"dtype": "U8", "shape": [until - at], "data_offsets": [at - begin, until - begin]}

        for info in sorted(self.header.tensors.values(), key=lambda info: info.offset):
            if info.offset > at:  # safetensors knows no gaps
                add(f"before {info.name}", info.offset)
                at = info.offset
            end = info.offset + info.nbytes
            add(info.name, end)
            at = end
        if (end := self.path.stat().st_size) > at:
            add("behind all", end)
        text, room = json.dumps(entries, separators=(",", ":")).encode(), begin - _PREFIX
        if len(text) > room:
            raise ValueError(
                f"{self.path}: the header of safetensors takes {len(text)} bytes, there is room for {room}"
            )
        return room.to_bytes(_PREFIX, "little") + text.ljust(room)

    def become(self, form: Form) -> None:
        """Puts the header of that format at the beginning, and has it written out."""
        if form == self._form:
            return
        self._form = form
        with self.path.open("r+b") as file:
            file.write(self._headers[form])
        self.sync()

    def content(self, name: str) -> bytes:
        """A tensor's bytes."""
        info = self.header.tensors[name]
        with self.path.open("rb") as file:
            file.seek(info.offset)
            return file.read(info.nbytes)

    @property
    def file_system(self) -> str:
        """The type of the file system that it lies on, as the system calls it."""
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
        above = [(point, kind) for point, kind in mounts if self.path.resolve().is_relative_to(point)]
        return max(above, key=lambda mount: len(mount[0]), default=("", "unknown"))[1]

    def sync(self) -> None:
        """Waits until the system has written everything out, so that it does not do so beside a measurement."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())

    def cached(self) -> float | None:
        """The share of the file that is in the page cache, by a look at a page of each MiB; None where nobody tells."""
        seen = found = 0
        page = bytearray(1)
        with self.path.open("rb", buffering=0) as file:
            for offset in range(0, self.path.stat().st_size, _STEP):
                seen += 1
                try:
                    found += os.preadv(file.fileno(), [page], offset, os.RWF_NOWAIT)
                except OSError as error:
                    if error.errno != EAGAIN:
                        return None
        return found / seen
