"""Bytes to ``Header``, pure: a parser that never touches a file and raises nothing but ``FormatError``.

The format is described at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; what ``strict`` holds to is
ggml's own reader, ``gguf.cpp`` there.
"""

from __future__ import annotations

from asyncload.gguf._array import Array, Scalar
from asyncload.gguf._header import Header, TensorInfo, Value
from asyncload.gguf._parser import HeaderParser
from asyncload.gguf._split import join_parts, split_count, split_paths
from asyncload.gguf._types import GGMLType, ValueType

__all__ = [
    "Array",
    "GGMLType",
    "Header",
    "HeaderParser",
    "Scalar",
    "TensorInfo",
    "Value",
    "ValueType",
    "join_parts",
    "split_count",
    "split_paths",
]
