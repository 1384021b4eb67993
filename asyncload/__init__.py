"""Asynchronous, pipelined loading of GGUF models into the memory of a GPU.

``load(path)`` brings a whole model; ``stream(path)`` passes the layers of one through a few slots of the device;
``Loader`` keeps a device and its buffers over many of both; ``read_header(path)`` reads no more than the header, and
``plan_memory`` says from that what would be where; ``blocking`` has all of it for programs without an event loop;
``errors`` what can go wrong. Importing this package loads none of numpy, Numba, CUDA or torch: each name below is
imported when it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from asyncload import blocking, errors
    from asyncload.events import Progress, ProgressStream
    from asyncload.layers import Layer, PassStats, write_trace
    from asyncload.loader import LayerRide, LayerStream, Loader, load, read_header, stream
    from asyncload.model import Model, Tensor
    from asyncload.options import Options
    from asyncload.plan import Plan, plan_memory

__all__ = [
    "Layer",
    "LayerRide",
    "LayerStream",
    "Loader",
    "Model",
    "Options",
    "PassStats",
    "Plan",
    "Progress",
    "ProgressStream",
    "Tensor",
    "__version__",
    "blocking",
    "errors",
    "load",
    "plan_memory",
    "read_header",
    "stream",
    "write_trace",
]

__version__ = "0.1.0"

_HOMES: Final = {
    "Layer": "asyncload.layers",
    "LayerRide": "asyncload.loader",
    "LayerStream": "asyncload.loader",
    "Loader": "asyncload.loader",
    "Model": "asyncload.model",
    "Options": "asyncload.options",
    "PassStats": "asyncload.layers",
    "Plan": "asyncload.plan",
    "Progress": "asyncload.events",
    "ProgressStream": "asyncload.events",
    "Tensor": "asyncload.model",
    "load": "asyncload.loader",
    "plan_memory": "asyncload.plan",
    "read_header": "asyncload.loader",
    "stream": "asyncload.loader",
    "write_trace": "asyncload.layers",
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
