"""Every setting and its default, once."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, Literal, get_args

from asyncload.errors import OptionsError

__all__ = ["DecodeOption", "DeviceKind", "Options", "format_size", "parse_size"]

DecodeOption = Literal["auto", "device", "host"]
DeviceKind = Literal["cuda", "host"]

_PREFIX: Final = "ASYNCLOAD_"
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?\s*", re.IGNORECASE)
_POWERS: Final = {None: 0, "k": 1, "m": 2, "g": 3, "t": 4}
# Measured: docs/design/0003-chunk-size-threads-depth.md.
_CHUNK_SIZES: Final[Mapping[DeviceKind, int]] = {"cuda": 16 << 20, "host": 4 << 20}
_BUFFERS: Final = 16
_MOST_STAGING: Final = 480 << 20


def parse_size(text: str) -> int:
    """Reads a size in bytes from text such as ``"64MiB"``, ``"1.5 GB"`` or ``"4096"``.

    KB, MB, GB, TB are powers of 1000, KiB, MiB, GiB, TiB of 1024. Raises ``ValueError`` for anything else.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no size: write bytes, or a number with a unit such as 64MiB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[unit and unit.lower()])


def format_size(nbytes: float) -> str:
    """Writes a size in bytes for people, in the largest binary unit that it fills."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:  # noqa: PLR2004 - the step between binary units
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def _default_threads() -> int:
    """One reader a core that this process may use, up to 8: more fall behind, as they fill the last-level cache."""
    return min(8, len(os.sched_getaffinity(0)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a loader works; every field has a default that suits a machine with one GPU.

    ``chunk_size`` (bytes) is the most that one staging buffer takes, 0 for what suits the device: 16 MiB for CUDA,
    4 MiB for the host, where reading, decoding and copying share the processor with the event loop. ``staging``
    (bytes) is the budget of all of them, read scratch included, 0 for 16 chunks and 480 MiB at most;
    ``decode`` says where blocks become numbers: on the ``"device"``, on the ``"host"`` before they cross the bus, or
    ``"auto"``: on a CUDA device where it has a kernel, else on the host;
    ``threads`` the reading and decoding threads; ``streams`` the device streams;
    ``depth`` the chunks that may be under way on one stream; ``retries`` how often a read that failed for a passing
    reason is made again, the first after ``retry_delay`` seconds and each later one after twice the time;
    ``nice`` what the worker threads add to the process's niceness, so that an event loop on the same cores runs first;
    ``stall_limit`` the seconds for which the consumers of a layer stream wait for one that keeps a layer;
    ``strict`` holds files to what ggml itself accepts. Raises ``OptionsError`` for a value that cannot be used.
    """

    chunk_size: int = 0
    staging: int = 0
    decode: DecodeOption = "auto"
    threads: int = field(default_factory=_default_threads)
    streams: int = 2
    depth: int = 2
    retries: int = 3
    retry_delay: float = 0.05
    nice: int = 10
    stall_limit: float = 30.0
    strict: bool = False

    def __post_init__(self) -> None:
        """Checks every field."""
        least = {"chunk_size": 64 << 10, "threads": 1, "streams": 1, "depth": 1, "retries": 0, "nice": 0}
        if self.chunk_size == 0:
            del least["chunk_size"]
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise OptionsError(f"{name} is {getattr(self, name)}, at least {bound} is needed", option=name)
        if not 0 <= self.retry_delay < float("inf"):
            raise OptionsError(
                f"retry_delay is {self.retry_delay}, it must be a number of seconds", option="retry_delay"
            )
        if not self.stall_limit > 0:
            raise OptionsError(f"stall_limit is {self.stall_limit}, it must be positive", option="stall_limit")
        if self.chunk_size % 4096:
            raise OptionsError(f"chunk_size is {self.chunk_size}, no multiple of 4096", option="chunk_size")
        if self.decode not in get_args(DecodeOption):
            raise OptionsError(f"decode is {self.decode!r}: use 'auto', 'device' or 'host'", option="decode")
        if self.staging < 2 * self.chunk_size and self.staging != 0:
            raise OptionsError(
                f"staging is {self.staging}, it must hold two chunks of {self.chunk_size} bytes", option="staging"
            )

    def suited_to(self, kind: DeviceKind) -> Options:
        """The same options with the sizes that suit a kind of device where they were left open."""
        chunk_size = self.chunk_size or _CHUNK_SIZES[kind]
        staging = self.staging or max(min(_BUFFERS * chunk_size, _MOST_STAGING), 2 * chunk_size)
        return replace(self, chunk_size=chunk_size, staging=staging)

    @property
    def buffers(self) -> int:
        """How many staging buffers the budget gives, once both sizes stand."""
        return self.staging // self.chunk_size if self.chunk_size else 0

    @property
    def scratch(self) -> int:
        """Bytes in which a device decodes, a chunk for each stream, once the chunk's size stands."""
        return self.streams * self.chunk_size

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Options:
        """Reads ``ASYNCLOAD_CHUNK_SIZE=64MiB`` and its like; what is not set keeps its default.

        Raises ``OptionsError`` for a value that cannot be read or used.
        """
        environ = os.environ if environ is None else environ
        readers: dict[str, Callable[[str], Any]] = {
            "chunk_size": parse_size,
            "staging": parse_size,
            "decode": str,
            "retry_delay": float,
            "stall_limit": float,
            "strict": _parse_bool,
        }
        values: dict[str, Any] = {}
        for option in fields(cls):
            text = environ.get(_PREFIX + option.name.upper())
            if text is None:
                continue
            try:
                values[option.name] = readers.get(option.name, int)(text)
            except (ValueError, OverflowError) as error:
                raise OptionsError(f"{_PREFIX}{option.name.upper()}={text!r}: {error}", option=option.name) from error
        return cls(**values)


def _parse_bool(text: str) -> bool:
    values = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    try:
        return values[text.strip().lower()]
    except KeyError:
        raise ValueError("write 1 or 0") from None
