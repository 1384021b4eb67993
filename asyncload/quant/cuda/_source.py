"""The text of a program: the files beside this one, the tables that they need, a line for each kernel."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from importlib.resources import files
from typing import Final

from asyncload.gguf import GGMLType
from asyncload.quant import FAMILIES, DType, _tables
from asyncload.quant.cuda import kernel_name

__all__ = ["assemble"]

_SIGNED: Final = 128  # what is added to signed bytes


def assemble(pairs: Collection[tuple[GGMLType, DType]], *, device: str | None = None) -> str:
    """The program for these pairs, upon ``device``: the text of ``device.cu`` or of a twin of it."""
    kernels = sorted({(type_, dtype, kernel_name(type_, dtype)) for type_, dtype in pairs})
    families = dict.fromkeys(FAMILIES[type_] for type_, _, _ in kernels)
    parts = [read("device") if device is None else device, read("block")]
    for family in families:
        parts += [make() for make in _TABLES.get(family, ())]
        parts.append(read(family))
    parts.append("".join(f"KERNEL({type_.name}, {dtype})\n" for type_, dtype, _ in kernels))
    return "\n".join(parts)


def read(name: str) -> str:
    """The text of one of the files."""
    return files("asyncload.quant.cuda").joinpath(f"{name}.cu").read_text("utf-8")


def _grid(name: str, pack: Callable[[list[int]], Iterable[int]]) -> str:
    """A grid as an array of words, made of each entry's numbers by ``pack``."""
    words = [word for entry in _tables.grid(name) for word in pack(entry)]
    lines = [", ".join(f"{word:#x}" for word in words[at : at + 8]) for at in range(0, len(words), 8)]
    return f"CONSTANT u32 {name}_GRID[{len(words)}] = {{\n" + ",\n".join(lines) + "};\n"


def _bytes(entry: list[int]) -> Iterable[int]:
    """Four numbers to a word."""
    return (int.from_bytes(bytes(entry[at : at + 4]), "little") for at in range(0, len(entry), 4))


def _nibbles(entry: list[int]) -> Iterable[int]:
    """Eight numbers from -1 to 1: the first four in the lower nibbles of a word's bytes, the others in the upper."""
    codes = [number + 1 for number in entry]
    return _bytes([low | high << 4 for low, high in zip(codes[:4], codes[4:], strict=True)])


def _values(name: str) -> str:
    """Sixteen signed values as four words."""
    words = _bytes([value + _SIGNED for value in _tables.values(name)])
    return f"#define {name}_VALUES {{" + ", ".join(f"{word:#x}" for word in words) + "}\n"


def _iq_tables() -> str:
    whole = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
    return "\n".join([*(_grid(name, _bytes) for name in whole), _grid("IQ1_S", _nibbles), _values("IQ4_NL")])


def _fp4_tables() -> str:
    return _values("MXFP4") + _values("NVFP4")


_TABLES: Final[Mapping[str, tuple[Callable[[], str], ...]]] = {"iquants": (_iq_tables,), "fp4": (_fp4_tables,)}
