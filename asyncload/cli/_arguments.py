"""The arguments that several commands have."""

from __future__ import annotations

import argparse
import re
from typing import Any, Final, get_args

from asyncload.options import DecodeOption, parse_size

__all__ = [
    "MEMORY",
    "count",
    "file_argument",
    "memory_arguments",
    "memory_settings",
    "request_arguments",
    "select_argument",
]

# The settings of a memory plan that the command has, by their names as arguments.
MEMORY: Final = ("context", "kv_type", "kv_bytes", "prefill_cache", "batch", "slots", "mode")


def file_argument(parser: argparse.ArgumentParser) -> None:
    """The model."""
    parser.add_argument("file", metavar="FILE", help="a GGUF file; any part of a split model stands for all of it")


def request_arguments(parser: argparse.ArgumentParser) -> None:
    """As what tensors are loaded, and where."""
    parser.add_argument("--device", metavar="NAME", help="host, cuda or cuda:N (default: the first GPU, else host)")
    parser.add_argument(
        "--dtype",
        metavar="DTYPE",
        action="append",
        type=_dtype,
        help="packed (default), bf16, f16 or f32; or PATTERN=DTYPE for the tensors that match, once for each pattern",
    )
    parser.add_argument(
        "--decode",
        choices=get_args(DecodeOption),
        help="where tensors are decoded (default: auto)",
    )


def select_argument(parser: argparse.ArgumentParser) -> None:
    """A part of a model."""
    parser.add_argument(
        "--select",
        metavar="WHAT",
        action="append",
        type=lambda text: int(text) if re.fullmatch("[0-9]+", text) else text,
        help="load only these: a tensor's name, a glob or a layer's number; may be given more than once",
    )


def count(text: str) -> int:
    """A number of things, of which there is at least one."""
    if not re.fullmatch("[0-9]+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _size(text: str) -> int:
    """A size in bytes."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _dtype(text: str) -> tuple[str | None, str]:
    """A dtype, with the pattern that it is for, if any; the loader judges both."""
    pattern, equals, dtype = text.rpartition("=")
    if equals and not (pattern and dtype):
        raise argparse.ArgumentTypeError(f"{text!r} is neither DTYPE nor PATTERN=DTYPE")
    return (pattern if equals else None, dtype)


def memory_arguments(parser: argparse.ArgumentParser, title: str, *, free: str) -> None:
    """How memory is planned; ``free`` says what ``--free`` is."""
    memory = parser.add_argument_group(title)
    memory.add_argument("--free", metavar="SIZE", type=_size, help=free)
    memory.add_argument("--context", metavar="TOKENS", type=int, help="what the cache of keys and values holds")
    memory.add_argument(
        "--kv-type", metavar="TYPE", help="the cache's type: f16 (default), f32, bf16, fp8, q8_0, q4_0, …"
    )
    memory.add_argument(
        "--kv-bytes", metavar="SIZE", type=_size, help="the cache's size, whatever the model says of it"
    )
    memory.add_argument("--prefill-cache", choices=("fp8", "fp16"), help="with copies of resident matrices for prefill")
    memory.add_argument(
        "--batch", metavar="TOKENS", type=int, help="what passes a layer at once, of which workspace is counted (512)"
    )
    memory.add_argument(
        "--slots", metavar="N", type=int, help="how many layers that stream are there at once (default: 2)"
    )
    memory.add_argument(
        "--mode",
        choices=("auto", "full", "hybrid", "stream"),
        help="what layers do (default: auto, the fastest that fits)",
    )


def memory_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those that were given, as arguments of ``plan_memory``."""
    given = {name: value for name in MEMORY if (value := getattr(arguments, name)) is not None}
    mode = given.pop("mode", "auto")
    return given if mode == "auto" else {**given, "allow": (mode,)}
