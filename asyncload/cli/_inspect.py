"""``asyncload inspect``: a header, for people and for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from asyncload.cli._run import run
from asyncload.cli.text import plain, table
from asyncload.options import Options, format_size

if TYPE_CHECKING:
    from asyncload.gguf import Header, TensorInfo

__all__ = ["describe", "inspect", "render"]

_FEW = 8  # elements of an array that are shown where not all are asked for


def inspect(file: str, *, tensors: bool, metadata: bool, as_json: bool) -> None:
    """Prints what a model's header says; raises what ``read_header`` raises."""
    from asyncload.loader import read_header

    header = run(partial(read_header, file, strict=Options.from_env().strict))
    if as_json:
        print(json.dumps(describe(file, header, arrays=metadata), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        print(render(file, header, tensors=tensors, metadata=metadata))


def describe(file: str, header: Header, *, arrays: bool = False) -> dict[str, Any]:
    """A header as plain values for JSON; arrays of the metadata with their first few elements, or with all."""
    return {
        "file": plain(file),
        "version": header.version,
        "parts": header.parts,
        "alignment": header.alignment,
        "data_offset": header.data_offset,
        "bytes": header.nbytes,
        "weights": sum(info.n_weights for info in header.tensors.values()),
        "types": {
            name: {"tensors": len(infos), "weights": _weights(infos), "bytes": _nbytes(infos)}
            for name, infos in _by_type(header.tensors.values()).items()
        },
        "layers": {
            str(layer): {"tensors": len(infos), "bytes": _nbytes(infos)} for layer, infos in header.layers.items()
        },
        "metadata": {key: _plain_value(value, all_of_it=arrays) for key, value in header.metadata.items()},
        "tensors": [
            {
                "name": info.name,
                "type": info.type.name,
                "shape": info.shape,
                "offset": info.offset,
                "bytes": info.nbytes,
                "part": info.part,
            }
            for info in header.tensors.values()
        ],
    }


def render(file: str, header: Header, *, tensors: bool = False, metadata: bool = False) -> str:
    """A header as text: an overview, then the table of types and that of layers, then what else is asked for."""
    sections = [_overview(file, header), _types(header), _layers(header)]
    if metadata:
        sections.append("\n".join(_metadata(header)))
    if tensors:
        sections.append(_tensors(header))
    return "\n\n".join(section for section in sections if section)


def _overview(file: str, header: Header) -> str:
    architecture = header.metadata.get("general.architecture")
    name = header.metadata.get("general.name")
    weights = _weights(header.tensors.values())
    rows = [
        ("file", f"{file} ({header.parts} parts)" if header.parts > 1 else file),
        ("model", " ".join(f"{value}" for value in (name, architecture and f"({architecture})") if value) or "unnamed"),
        ("format", f"GGUF {header.version}, data from byte {header.data_offset:,}, aligned to {header.alignment}"),
        ("tensors", f"{len(header.tensors):,}, {weights:,} weights, {format_size(header.nbytes)}"),
        ("metadata", f"{len(header.metadata)} keys"),
    ]
    return table(rows, align="<<")


def _types(header: Header) -> str:
    rows: list[tuple[object, ...]] = [("type", "tensors", "weights", "bytes", "share", "bits/weight")]
    for name, infos in _by_type(header.tensors.values()).items():
        weights, nbytes = _weights(infos), _nbytes(infos)
        rows.append(
            (
                name,
                len(infos),
                f"{weights:,}",
                f"{nbytes:,}",
                f"{nbytes / header.nbytes:.1%}" if header.nbytes else "-",
                f"{8 * nbytes / weights:.2f}" if weights else "-",
            )
        )
    return table(rows, align="<>>>>>")


def _layers(header: Header) -> str:
    if not header.layers:
        return ""
    inside = sum(_nbytes(infos) for infos in header.layers.values())
    rows: list[tuple[object, ...]] = [("layer", "tensors", "bytes", "types")]
    rows += (
        (layer, len(infos), f"{_nbytes(infos):,}", " ".join(_by_type(infos))) for layer, infos in header.layers.items()
    )
    rows.append(
        ("other", len(header.tensors) - sum(map(len, header.layers.values())), f"{header.nbytes - inside:,}", "")
    )
    return table(rows, align=">>><")


def _tensors(header: Header) -> str:
    rows: list[tuple[object, ...]] = [("tensor", "type", "shape", "bytes", "offset", "part")]
    rows += (
        (info.name, info.type.name, " x ".join(map(str, info.shape)), f"{info.nbytes:,}", info.offset, info.part)
        for info in header.tensors.values()
    )
    return table(rows, align="<<<>>>")


def _metadata(header: Header) -> Iterator[str]:
    for key, value in header.metadata.items():
        if isinstance(value, str | int | float):
            text = repr(value) if isinstance(value, str) else str(value)
        else:
            few = ", ".join(repr(item) for item in islice(value, _FEW))
            text = f"[{few}{', ...' if len(value) > _FEW else ''}] ({len(value):,} elements)"
        yield f"{plain(key)} = {plain(text)}"


def _plain_value(value: Any, *, all_of_it: bool) -> Any:
    """A metadata value for JSON, which has no infinities: they are written as text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str | int):
        return value
    if all_of_it:
        return [_plain_value(item, all_of_it=True) for item in value]
    return {
        "length": len(value),
        "first": [_plain_value(item, all_of_it=False) for item in islice(value, _FEW)],
    }


def _by_type(infos: Iterable[TensorInfo]) -> dict[str, list[TensorInfo]]:
    """Tensors by the name of their type, the type with the most bytes first."""
    groups: dict[str, list[TensorInfo]] = {}
    for info in infos:
        groups.setdefault(info.type.name, []).append(info)
    return dict(sorted(groups.items(), key=lambda group: -_nbytes(group[1])))


def _weights(infos: Iterable[TensorInfo]) -> int:
    return sum(info.n_weights for info in infos)


def _nbytes(infos: Iterable[TensorInfo]) -> int:
    return sum(info.nbytes for info in infos)
