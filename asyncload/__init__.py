"""Asynchronous, pipelined loading of GGUF models into the memory of a GPU.

``load(path)`` brings a whole model; ``Loader`` keeps a device and its buffers over many loads; ``read_header(path)``
reads no more than the header; ``blocking`` has all of it for programs without an event loop; ``errors`` what can go
wrong. Importing this package loads none of numpy, Numba, CUDA or torch: each name below is imported when it is asked
for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from asyncload import blocking, errors
    from asyncload.events import Progress, ProgressStream
    from asyncload.loader import Loader, load, read_header
    from asyncload.model import Model, Tensor
    from asyncload.options import Options

__all__ = [
    "Loader",
    "Model",
    "Options",
    "Progress",
    "ProgressStream",
    "Tensor",
    "__version__",
    "blocking",
    "errors",
    "load",
    "read_header",
]

__version__ = "0.1.0"

_HOMES: Final = {
    "Loader": "asyncload.loader",
    "Model": "asyncload.model",
    "Options": "asyncload.options",
    "Progress": "asyncload.events",
    "ProgressStream": "asyncload.events",
    "Tensor": "asyncload.model",
    "load": "asyncload.loader",
    "read_header": "asyncload.loader",
}
_ROOMS: Final = frozenset({"blocking", "errors"})


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for (PEP 562)."""
    if name in _ROOMS:
        return import_module(f"asyncload.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'asyncload' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted(__all__)
