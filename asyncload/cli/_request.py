"""The loader's form of what the command was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from asyncload.cli._run import run
from asyncload.options import DecodeOption, DeviceKind, Options

if TYPE_CHECKING:
    from asyncload.gguf import Header

__all__ = ["dtype_spec", "options_with", "read_for"]


def dtype_spec(dtypes: Sequence[tuple[str | None, str]]) -> str | dict[str, str]:
    """The loader's form of the command's dtypes: one dtype, or a mapping whose catch-all, if any, comes last."""
    patterns = {pattern: dtype for pattern, dtype in dtypes if pattern is not None}
    rest = [dtype for pattern, dtype in dtypes if pattern is None][-1:]
    if not patterns:
        return rest[0] if rest else "packed"
    return patterns | dict.fromkeys(("*",) if rest else (), rest[0] if rest else "")


def options_with(decode: DecodeOption | None) -> Options:
    """The environment's options, with the command's choice where it made one."""
    options = Options.from_env()
    return options if decode is None else replace(options, decode=decode)


def read_for(file: str, device: str | None, decode: DecodeOption | None) -> tuple[Header, str, DeviceKind, Options]:
    """A model's header, and what it is planned for: the device's name and kind, and the options that suit that.

    The device need not be there. Raises what ``read_header`` and ``parse_device`` raise.
    """
    from asyncload.device import default_device, parse_device
    from asyncload.loader import read_header

    device = device or default_device()
    kind, _ = parse_device(device)
    options = options_with(decode).suited_to(kind)
    return run(partial(read_header, file, strict=options.strict)), device, kind, options
