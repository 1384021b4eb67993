"""Blocks to numbers: what each ggml type decodes to, and the host kernels that decode it.

Importing this room costs nothing: numpy and Numba come with ``prepare``, which runs on a worker thread.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Final

from asyncload.errors import OptionsError
from asyncload.gguf import GGMLType

__all__ = [
    "FAMILIES",
    "DType",
    "can_decode",
    "compiler",
    "decode",
    "kernel_address",
    "native_dtype",
    "prepare",
    "refusal",
]


class DType(StrEnum):
    """The type of a tensor's elements, by the name that numpy and torch share."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT64 = "int64"
    INT32 = "int32"
    INT16 = "int16"
    INT8 = "int8"
    UINT8 = "uint8"

    @property
    def itemsize(self) -> int:
        """The bytes that one element takes."""
        return _ITEMSIZES[self]

    @classmethod
    def parse(cls, text: str) -> DType:
        """Reads a dtype from its name or a usual short form, such as ``"bf16"``, ``"half"`` or ``"f32"``.

        Raises ``OptionsError`` for anything else.
        """
        name = text.strip().lower()
        try:
            return cls(_ALIASES.get(name, name))
        except ValueError:
            raise OptionsError(f"{text!r} is no dtype: use float32, float16 or bfloat16", option="dtype") from None


_ITEMSIZES: Final = {dtype: int(dtype.value.strip("abcdefghijklmnopqrstuvwxyz")) // 8 for dtype in DType}
_ALIASES: Final = {
    "bf16": "bfloat16",
    "f16": "float16",
    "fp16": "float16",
    "half": "float16",
    "f32": "float32",
    "fp32": "float32",
    "float": "float32",
    "f64": "float64",
    "fp64": "float64",
    "double": "float64",
    **{f"i{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
}
_NATIVE: Final = {
    GGMLType.F64: DType.FLOAT64,
    GGMLType.F32: DType.FLOAT32,
    GGMLType.F16: DType.FLOAT16,
    GGMLType.BF16: DType.BFLOAT16,
    GGMLType.I64: DType.INT64,
    GGMLType.I32: DType.INT32,
    GGMLType.I16: DType.INT16,
    GGMLType.I8: DType.INT8,
}
_TYPES: Final[Mapping[str, str]] = {
    "floats": "F64 F32 F16 BF16",
    "legacy": "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0",
    "kquants": "Q2_K Q3_K Q4_K Q5_K Q6_K",
    "iquants": "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS",
    "ternary": "TQ1_0 TQ2_0 Q1_0 Q2_0",
    "fp4": "MXFP4 NVFP4",
}
_ACTIVATIONS: Final = frozenset({GGMLType.Q8_1, GGMLType.Q8_K})
_FLOATS: Final = frozenset({DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16})

#: Which file has a type's kernels: the host's beside this one, with an underscore before the name, CUDA's in ``cuda``.
FAMILIES: Final[Mapping[GGMLType, str]] = MappingProxyType(
    {GGMLType[name]: family for family, names in _TYPES.items() for name in names.split()}
)


def native_dtype(type: GGMLType) -> DType | None:  # noqa: A002 - the field's name
    """The dtype that a type's bytes already are, or None for a quantized type."""
    return _NATIVE.get(type)


def can_decode(type: GGMLType, dtype: DType) -> bool:  # noqa: A002
    """Whether ``decode`` can make elements of ``dtype`` from a type's blocks; plain types can stay what they are."""
    return _NATIVE.get(type) is dtype or (type in FAMILIES and dtype in _FLOATS)


def refusal(type: GGMLType, dtype: DType) -> str:  # noqa: A002
    """What to say of a pair that ``can_decode`` denies."""
    message = f"{type.name} cannot be decoded to {dtype}"
    if type in _ACTIVATIONS:
        message += ": it is what ggml turns activations into, and no weights are stored as it"
    return message


def prepare(pairs: Collection[tuple[GGMLType, DType]]) -> None:
    """Makes the kernels for these pairs ready in this process, so that ``decode`` and ``kernel_address`` do not wait.

    Blocks, for a second or two where a kernel is not in the cache on disk: it is compiled in a subprocess then, since
    the compiler holds the interpreter lock. Where the cache cannot be written it is compiled here, and the logger
    ``asyncload.quant`` says so. May be called on any thread. Raises ``UnsupportedQuantError`` for a pair that
    ``can_decode`` denies, before anything is compiled.
    """
    from asyncload.quant._prepare import prepare as prepare_kernels

    prepare_kernels(pairs)


def decode(type: GGMLType, dtype: DType, source: memoryview, target: memoryview) -> None:  # noqa: A002
    """Decodes whole blocks of ``type`` into elements of ``dtype``; both views are contiguous, with any alignment.

    In float32 the values are those of ggml's reference decoders, bit for bit; float16 and bfloat16 are these rounded to
    the nearest, ties to even; a NaN stays one. Where ``dtype`` is what the bytes already are, they are copied. The
    interpreter lock is released meanwhile. A pair that ``prepare`` has not seen is prepared first. The views must not
    overlap.

    Raises ``UnsupportedQuantError`` for a pair that ``can_decode`` denies, ``RangeError`` unless source and target hold
    the same number of weights in whole blocks, ``TypeError`` for a target that is read-only, ``BufferError`` for a view
    that is not contiguous.
    """
    from asyncload.quant._decode import decode as decode_blocks

    decode_blocks(type, dtype, source, target)


def kernel_address(type: GGMLType, dtype: DType) -> int:  # noqa: A002
    """The address of a C function that decodes as ``decode`` does, for threads that run without the interpreter.

    It is ``int32_t kernel(const void *source, void *target, int64_t n_blocks)`` and checks nothing: source and target
    hold ``n_blocks`` whole blocks, 0 or more, and their elements, with any alignment, and do not overlap. It returns 1
    once these are decoded; anything else is a failure (Numba prints an exception and returns 0). Any number of threads
    may be in it at once, and it takes no lock, the interpreter's neither. The address stays the same, and valid until
    the interpreter ends.

    A pair that is not ready is prepared first, as by ``prepare``, which passes over what ``decode`` copies. Raises
    ``UnsupportedQuantError`` for a pair that ``can_decode`` denies.
    """
    from asyncload.quant._prepare import kernel_address as address_of_kernel

    return address_of_kernel(type, dtype)


def compiler() -> tuple[str, Path | None]:
    """The version of Numba, and the folder that keeps what it has compiled; None where none can be written to."""
    import numba

    from asyncload.quant._compiled import cache_folder

    return numba.__version__, cache_folder()
