"""The arguments of the command, and its help."""

from __future__ import annotations

import argparse
import re
from functools import partial
from typing import get_args

from asyncload import __version__
from asyncload.options import DecodeOption, parse_size

__all__ = ["make_parser"]

_EXAMPLES = """\
examples:
  asyncload inspect model.gguf                     what is in a model: types, layers, sizes
  asyncload inspect model.gguf --tensors           and every tensor
  asyncload inspect model.gguf --json | jq .types  the same for programs
  asyncload load model.gguf                        load into the first GPU, or into host memory where there is none
  asyncload load model.gguf --device host --dtype bf16
  asyncload load model.gguf --select 0 --select 'token_embd.*'
  asyncload plan model.gguf --dtype bf16           where each tensor would be decoded, and what crosses the bus
  asyncload plan model.gguf --free 8GiB --context 8192
                                                   which layers would stay in 8 GiB, and which would stream
  asyncload warmup                                 compile all kernels now, so that no load has to
  asyncload doctor                                 what a load would work with here, and what is missing

environment:
  ASYNCLOAD_CHUNK_SIZE=64MiB, ASYNCLOAD_STAGING, ASYNCLOAD_THREADS, ASYNCLOAD_STREAMS and their like set the options
  of the same names.

exit codes: 0 done, 1 failed (one line on stderr says why), 2 arguments that make no sense, 130 interrupted.
"""


def make_parser() -> argparse.ArgumentParser:
    """Builds the parser; the parsed arguments carry the function to call as ``command``."""
    parser = argparse.ArgumentParser(
        prog="asyncload",
        description="Looks into GGUF models and loads them into GPU memory.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"asyncload {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _inspect_arguments(
        commands.add_parser(
            "inspect",
            help="show what is in a model without reading its tensors",
            description="Shows a model's header: sizes, types, layers. Reads no tensor data.",
        )
    )
    _load_arguments(
        commands.add_parser(
            "load",
            help="load a model and say how that went",
            description="Loads a model, shows progress, and sums up: bytes, seconds by stage, GB/s, the bottleneck.",
        )
    )
    _plan_arguments(
        commands.add_parser(
            "plan",
            help="show what a load would do, or, with --free, how a model would share a device's memory",
            description="Shows what a load would do with each tensor; with --free, which layers stay on the device and "
            "which pass through slots, beside the cache and the workspace. Reads no tensor data and needs no GPU.",
        )
    )
    _warmup_arguments(
        commands.add_parser(
            "warmup",
            help="compile the decoding kernels ahead of the first load",
            description="Compiles all decoding kernels that are not yet in the caches on disk.",
        )
    )
    _doctor_arguments(
        commands.add_parser(
            "doctor",
            help="show what a load would work with here, and what is missing",
            description="Shows the engine that would serve and why, drivers, devices, compilers, caches, memory. Exits "
            "with 1 where a load cannot work.",
        )
    )
    return parser


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a GGUF file; any part of a split model stands for all of it")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--metadata", action="store_true", help="list the metadata, with --json arrays in full")
    parser.add_argument("--json", action="store_true", help="print one JSON object, tensors and metadata included")
    parser.set_defaults(command=_inspect)


def _load_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a GGUF file; any part of a split model stands for all of it")
    _request_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    parser.add_argument(
        "--no-progress", action="store_true", help="no progress bar (none either where stderr is no terminal)"
    )
    parser.set_defaults(command=_load)


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a GGUF file; any part of a split model stands for all of it")
    _request_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON object")
    memory = parser.add_argument_group("memory, with --free")
    memory.add_argument("--free", metavar="SIZE", type=_size, help="bytes free on the device, such as 8GiB")
    memory.add_argument("--context", metavar="TOKENS", type=int, help="what the cache of keys and values holds")
    memory.add_argument(
        "--kv-type", metavar="TYPE", help="the cache's type: f16 (default), f32, bf16, fp8, q8_0, q4_0, …"
    )
    memory.add_argument(
        "--kv-bytes", metavar="SIZE", type=_size, help="the cache's size, whatever the model says of it"
    )
    memory.add_argument("--prefill-cache", choices=("fp8", "fp16"), help="with copies of resident matrices for prefill")
    memory.add_argument(
        "--slots", metavar="N", type=int, help="how many layers that stream are there at once (default: 2)"
    )
    memory.add_argument(
        "--mode",
        choices=("auto", "full", "hybrid", "stream"),
        help="what layers do (default: auto, the fastest that fits)",
    )
    parser.set_defaults(command=partial(_plan, parser))


def _warmup_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="host, cuda or cuda:N (default: the host and the first GPU, if any)",
    )
    parser.add_argument(
        "--dtype", metavar="DTYPE", action="append", help="bf16, f16 or f32 (default: all); may be given more than once"
    )
    parser.set_defaults(command=_warmup)


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="NAME", help="host, cuda or cuda:N (default: the first GPU, else host)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(command=_doctor)


def _request_arguments(parser: argparse.ArgumentParser) -> None:
    """What to load, as what, and where."""
    parser.add_argument("--device", metavar="NAME", help="host, cuda or cuda:N (default: the first GPU, else host)")
    parser.add_argument(
        "--dtype",
        metavar="DTYPE",
        action="append",
        type=_dtype,
        help="packed (default), bf16, f16 or f32; or PATTERN=DTYPE for the tensors that match, once for each pattern",
    )
    parser.add_argument(
        "--select",
        metavar="WHAT",
        action="append",
        type=lambda text: int(text) if re.fullmatch("[0-9]+", text) else text,
        help="load only these: a tensor's name, a glob or a layer's number; may be given more than once",
    )
    parser.add_argument(
        "--decode",
        choices=get_args(DecodeOption),
        help="where tensors are decoded (default: auto)",
    )


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


def _inspect(arguments: argparse.Namespace) -> None:
    from asyncload.cli._inspect import inspect

    inspect(arguments.file, tensors=arguments.tensors, metadata=arguments.metadata, as_json=arguments.json)


def _load(arguments: argparse.Namespace) -> None:
    from asyncload.cli._load import load

    load(
        arguments.file,
        device=arguments.device,
        dtypes=arguments.dtype or [],
        select=arguments.select,
        decode=arguments.decode,
        as_json=arguments.json,
        progress=not arguments.no_progress,
    )


def _plan(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    names = ("context", "kv_type", "kv_bytes", "prefill_cache", "slots")
    settings = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.free is None:
        _plan_load(parser, arguments, [*settings, *(["mode"] if arguments.mode else [])])
    elif arguments.select is not None:
        parser.error("--select and --free do not go together: memory is planned for a whole model")
    else:
        from asyncload.cli._memory import show_memory

        show_memory(
            arguments.file,
            device=arguments.device,
            dtypes=arguments.dtype or [],
            decode=arguments.decode,
            mode=arguments.mode or "auto",
            free=arguments.free,
            settings=settings,
            as_json=arguments.json,
        )


def _plan_load(parser: argparse.ArgumentParser, arguments: argparse.Namespace, meaningless: list[str]) -> None:
    from asyncload.cli._plan import plan

    if meaningless:
        parser.error(f"--{meaningless[0].replace('_', '-')} needs --free")
    plan(
        arguments.file,
        device=arguments.device,
        dtypes=arguments.dtype or [],
        select=arguments.select,
        decode=arguments.decode,
        as_json=arguments.json,
    )


def _warmup(arguments: argparse.Namespace) -> None:
    from asyncload.cli._warmup import warm_up

    warm_up(device=arguments.device, dtypes=arguments.dtype)


def _doctor(arguments: argparse.Namespace) -> None:
    from asyncload.cli._doctor import doctor

    doctor(device=arguments.device, as_json=arguments.json)
