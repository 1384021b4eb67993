"""Every setting and its default, once."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Literal, get_args

from asyncload.errors import OptionsError

__all__ = ["DecodeOption", "DeviceKind", "EngineOption", "Options", "format_size", "parse_size"]

EngineOption = Literal["auto", "native", "python"]
DecodeOption = Literal["auto", "device", "host"]
DeviceKind = Literal["cuda", "host"]

_PREFIX: Final = "ASYNCLOAD_"
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?\s*", re.IGNORECASE)
_POWERS: Final = {None: 0, "k": 1, "m": 2, "g": 3, "t": 4}
# Measured: docs/design/0003-chunk-size-threads-depth.md and 0005-native-engine.md.
_CHUNK_SIZES: Final[Mapping[tuple[str, DeviceKind], int]] = {
    ("python", "cuda"): 16 << 20,  # each chunk costs some Python
    ("python", "host"): 4 << 20,
    ("native", "cuda"): 2 << 20,  # copies of several threads go together
    ("native", "host"): 4 << 20,
}
_BUFFERS: Final = 16
# The native engine's: while others are copied, one is read.
_BUFFERS_PER_THREAD: Final[Mapping[DeviceKind, int]] = {"cuda": 4, "host": 2}
_MOST_STAGING: Final = 480 << 20
_THREADS: Final[Mapping[tuple[str, DeviceKind], int]] = {
    ("python", "cuda"): 8,  # more fall behind, as they fill the last-level cache
    ("python", "host"): 8,
    ("native", "cuda"): 12,  # fewer do where memory is fast; more leave a buffer no time in the cache
    ("native", "host"): 8,
}
_STREAMS: Final = 2


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a loader works; every field has a default that suits a machine with one GPU.

    ``engine`` moves the bytes: ``"native"``, the C++ threads of ``asyncload_native``, ``"python"``, or ``"auto"``: the
    former where it was built. What is not a local file is always read by the Python engine.
    ``chunk_size`` (bytes) is the most that one staging buffer takes, 0 for what suits: 4 MiB on the host; 2 MiB, and 16
    MiB with the Python engine, for CUDA. ``staging`` (bytes) is the budget of all of them, read scratch included, 0 for
    two chunks a thread, or four with CUDA (native), or 16 chunks, and 480 MiB at most;
    ``decode`` says where blocks become numbers: on the ``"device"``, on the ``"host"`` before they cross the bus, or
    ``"auto"``: on a CUDA device where it has a kernel, else on the host;
    ``threads`` the reading and decoding threads, 0 for one a core that this process may use, up to 8, or 12
    (native, with CUDA);
    ``streams`` the device streams of the Python engine, 0 for two (the native engine has one a thread);
    ``depth`` the chunks that may be under way on one of these; ``retries`` how often a read that failed for a passing
    reason is made again, the first after ``retry_delay`` seconds and each later one after twice the time;
    ``nice`` what the worker threads add to the process's niceness, so that an event loop on the same cores runs first;
    ``stall_limit`` the seconds for which the consumers of a layer stream, and who closes it, wait for one that keeps
    a layer;
    ``strict`` holds files to what ggml itself accepts. Raises ``OptionsError`` for a value that cannot be used.
    """

    engine: EngineOption = "auto"
    chunk_size: int = 0
    staging: int = 0
    decode: DecodeOption = "auto"
    threads: int = 0
    streams: int = 0
    depth: int = 2
    retries: int = 3
    retry_delay: float = 0.05
    nice: int = 10
    stall_limit: float = 30.0
    strict: bool = False

    def __post_init__(self) -> None:
        """Checks every field."""
        least = {"chunk_size": 64 << 10, "threads": 1, "streams": 1, "depth": 1, "retries": 0, "nice": 0}
        left_open = {name for name in ("chunk_size", "threads", "streams") if getattr(self, name) == 0}
        for name, bound in least.items():
            if getattr(self, name) < bound and name not in left_open:
                raise OptionsError(f"{name} is {getattr(self, name)}, at least {bound} is needed", option=name)
        if not 0 <= self.retry_delay < float("inf"):
            raise OptionsError(
                f"retry_delay is {self.retry_delay}, it must be a number of seconds", option="retry_delay"
            )
        if not self.stall_limit > 0:
            raise OptionsError(f"stall_limit is {self.stall_limit}, it must be positive", option="stall_limit")
        if self.chunk_size % 4096:
            raise OptionsError(f"chunk_size is {self.chunk_size}, no multiple of 4096", option="chunk_size")
        for name, choices in (("decode", get_args(DecodeOption)), ("engine", get_args(EngineOption))):
            if getattr(self, name) not in choices:
                raise OptionsError(f"{name} is {getattr(self, name)!r}: use one of {', '.join(choices)}", option=name)
        if self.staging < 2 * self.chunk_size and self.staging != 0:
            raise OptionsError(
                f"staging is {self.staging}, it must hold two chunks of {self.chunk_size} bytes", option="staging"
            )

    def suited_to(self, kind: DeviceKind) -> Options:
        """The same options with the sizes that suit a kind of device, and the engine, where they were left open."""
        native = self.engine != "python"
        engine = "native" if native else "python"
        chunk_size = self.chunk_size or _CHUNK_SIZES[engine, kind]
        threads = self.threads or min(_THREADS[engine, kind], len(os.sched_getaffinity(0)))
        buffers = _BUFFERS_PER_THREAD[kind] * threads if native else _BUFFERS
        staging = self.staging or max(min(buffers * chunk_size, _MOST_STAGING), 2 * chunk_size)
        streams = self.streams or _STREAMS
        if native:  # each thread has a stream of its own, and at least one buffer
            streams = threads = min(threads, staging // chunk_size)
        return replace(self, chunk_size=chunk_size, staging=staging, threads=threads, streams=streams)

    @property
    def buffers(self) -> int:
        """How many staging buffers the budget gives, once both sizes stand."""
        return self.staging // self.chunk_size if self.chunk_size else 0

    @property
    def scratch_chunks(self) -> int:
        """How many chunks a device decodes in, once the sizes stand.

        One for each stream; with the native engine one for each staging buffer.
        """
        return self.streams if self.engine == "python" else self.buffers

    @property
    def scratch(self) -> int:
        """Bytes of these."""
        return self.scratch_chunks * self.chunk_size

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
            "engine": str,
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
