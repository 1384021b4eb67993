"""ggml itself, through ctypes: what its reader of GGUF makes of a file, and what its tables say of a type."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["block_and_type_size", "decode", "read_header"]

_LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)

_messages: list[str] = []


def _keep(_level: int, text: bytes, _data: object) -> None:
    _messages.append(text.decode(errors="replace"))


_log = _LogCallback(_keep)  # kept as long as ggml may call it


class _Params(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(ctypes.c_void_p)))


class _Traits(ctypes.Structure):
    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block_size", ctypes.c_int64),
        ("block_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float", ctypes.c_void_p),
    )


@cache
def _library() -> Any:
    spec = find_spec("libggml")
    assert spec is not None
    assert spec.submodule_search_locations
    library = ctypes.CDLL(str(Path(next(iter(spec.submodule_search_locations))) / "lib64" / "libggml-base.so"))
    for name, result, *arguments in (
        ("gguf_init_from_buffer", ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, _Params),
        ("gguf_free", None, ctypes.c_void_p),
        ("ggml_free", None, ctypes.c_void_p),
        ("gguf_get_alignment", ctypes.c_size_t, ctypes.c_void_p),
        ("gguf_get_data_offset", ctypes.c_size_t, ctypes.c_void_p),
        ("gguf_get_n_kv", ctypes.c_int64, ctypes.c_void_p),
        ("gguf_get_key", ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64),
        ("gguf_get_n_tensors", ctypes.c_int64, ctypes.c_void_p),
        ("gguf_get_tensor_name", ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64),
        ("gguf_get_tensor_type", ctypes.c_int, ctypes.c_void_p, ctypes.c_int64),
        ("gguf_get_tensor_offset", ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int64),
        ("gguf_get_tensor_size", ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int64),
        ("ggml_blck_size", ctypes.c_int64, ctypes.c_int),
        ("ggml_type_size", ctypes.c_size_t, ctypes.c_int),
        ("ggml_get_type_traits", ctypes.POINTER(_Traits), ctypes.c_int),
        ("ggml_log_set", None, _LogCallback, ctypes.c_void_p),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.ggml_log_set(_log, None)
    return library


def block_and_type_size(number: int) -> tuple[int, int]:
    """Weights and bytes of a block; zeros for a type that has been removed."""
    library = _library()
    return library.ggml_blck_size(number), library.ggml_type_size(number)


def read_header(data: bytes) -> dict[str, Any] | str:
    """What ggml reads, its data included, or what it says against the file."""
    library = _library()
    context = ctypes.c_void_p()
    _messages.clear()
    gguf = library.gguf_init_from_buffer(data, len(data), _Params(no_alloc=False, ctx=ctypes.pointer(context)))
    if not gguf:
        return "".join(_messages)
    try:
        data_offset = library.gguf_get_data_offset(gguf)
        return {
            "alignment": library.gguf_get_alignment(gguf),
            "keys": [
                library.gguf_get_key(gguf, i).decode(errors="replace") for i in range(library.gguf_get_n_kv(gguf))
            ],
            "tensors": {
                library.gguf_get_tensor_name(gguf, i).decode(errors="replace"): (
                    library.gguf_get_tensor_type(gguf, i),
                    data_offset + library.gguf_get_tensor_offset(gguf, i),
                    library.gguf_get_tensor_size(gguf, i),
                )
                for i in range(library.gguf_get_n_tensors(gguf))
            },
        }
    finally:
        library.gguf_free(gguf)
        library.ggml_free(context)


def decode(number: int, data: bytes, n_weights: int) -> NDArray[np.float32] | None:
    """The weights of whole blocks as ggml decodes them; None for a type that it only encodes."""
    to_float = _library().ggml_get_type_traits(number).contents.to_float
    if not to_float:
        return None
    weights = np.empty(n_weights, np.float32)
    _ToFloat(to_float)(data, weights.ctypes.data, n_weights)
    return weights
