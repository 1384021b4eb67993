"""The loader's form of what the command was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from asyncload.options import DecodeOption, Options

__all__ = ["dtype_spec", "options_with"]


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
