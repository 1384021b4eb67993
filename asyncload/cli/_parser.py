"""The arguments of the command, and its help."""

from __future__ import annotations

import argparse
from functools import partial

from asyncload import __version__
from asyncload.cli._arguments import (
    MEMORY,
    count,
    file_argument,
    memory_arguments,
    memory_settings,
    request_arguments,
    select_argument,
)

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
  asyncload stream model.gguf --slots 3 --mode stream --trace passes.json
                                                   pass all layers through three slots, and say what that took
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
    _stream_arguments(
        commands.add_parser(
            "stream",
            help="pass a model's layers through a few slots and say what that took",
            description="Passes the layers of a model through a few slots of the device, without any work on them, and "
            "says what each pass took by the device's clock.",
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
    file_argument(parser)
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--metadata", action="store_true", help="list the metadata, with --json arrays in full")
    parser.add_argument("--json", action="store_true", help="print one JSON object, tensors and metadata included")
    parser.set_defaults(command=_inspect)


def _load_arguments(parser: argparse.ArgumentParser) -> None:
    file_argument(parser)
    request_arguments(parser)
    select_argument(parser)
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    parser.add_argument(
        "--no-progress", action="store_true", help="no progress bar (none either where stderr is no terminal)"
    )
    parser.set_defaults(command=_load)


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    file_argument(parser)
    request_arguments(parser)
    select_argument(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON object")
    memory_arguments(parser, "memory, with --free", free="bytes free on the device, such as 8GiB")
    parser.set_defaults(command=partial(_plan, parser))


def _stream_arguments(parser: argparse.ArgumentParser) -> None:
    file_argument(parser)
    request_arguments(parser)
    parser.add_argument("--passes", metavar="N", type=count, default=3, help="how many passes (default: 3)")
    parser.add_argument(
        "--host",
        choices=("auto", "slabs", "file"),
        default="auto",
        help="keep layers in pinned host memory, or read them in each pass (default: auto, by the memory there is)",
    )
    parser.add_argument("--layers", action="store_true", help="with figures for each layer, of the last pass")
    parser.add_argument("--trace", metavar="FILE", help="write a trace for https://ui.perfetto.dev")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    memory_arguments(parser, "memory", free="what may be taken, such as 8GiB (default: what is free now)")
    parser.set_defaults(command=_stream)


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
    if arguments.free is None:
        _plan_load(parser, arguments)
    elif arguments.select is not None:
        parser.error("--select and --free do not go together: memory is planned for a whole model")
    else:
        from asyncload.cli._memory import show_memory

        show_memory(
            arguments.file,
            device=arguments.device,
            dtypes=arguments.dtype or [],
            decode=arguments.decode,
            free=arguments.free,
            settings=memory_settings(arguments),
            as_json=arguments.json,
        )


def _plan_load(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    from asyncload.cli._plan import plan

    for name in MEMORY:
        if getattr(arguments, name) is not None:
            parser.error(f"--{name.replace('_', '-')} needs --free")
    plan(
        arguments.file,
        device=arguments.device,
        dtypes=arguments.dtype or [],
        select=arguments.select,
        decode=arguments.decode,
        as_json=arguments.json,
    )


def _stream(arguments: argparse.Namespace) -> None:
    from asyncload.cli._stream import stream

    stream(
        arguments.file,
        device=arguments.device,
        dtypes=arguments.dtype or [],
        decode=arguments.decode,
        host=arguments.host,
        free=arguments.free,
        settings=memory_settings(arguments),
        passes=arguments.passes,
        layers=arguments.layers,
        trace=arguments.trace,
        as_json=arguments.json,
    )


def _warmup(arguments: argparse.Namespace) -> None:
    from asyncload.cli._warmup import warm_up

    warm_up(device=arguments.device, dtypes=arguments.dtype)


def _doctor(arguments: argparse.Namespace) -> None:
    from asyncload.cli._doctor import doctor

    doctor(device=arguments.device, as_json=arguments.json)
