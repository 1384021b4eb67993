"""What programs built on asyncload, and its own tests, test with: synthetic models, slow and broken sources.

Each name is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from asyncload.device import HostDevice
    from asyncload.testing._blocks import random_blocks
    from asyncload.testing._cuda_kernel import SleepingKernel
    from asyncload.testing._device_conformance import DeviceConformance
    from asyncload.testing._gguf_writer import MetadataValue, TensorSpec, Typed, encode_header, lay_out, write_gguf
    from asyncload.testing._sources import AsyncOnlySource, FaultySource, LatencySource, ThrottledSource
    from asyncload.testing._synthesize import synthesize

__all__ = [
    "AsyncOnlySource",
    "DeviceConformance",
    "FaultySource",
    "HostDevice",
    "LatencySource",
    "MetadataValue",
    "SleepingKernel",
    "TensorSpec",
    "ThrottledSource",
    "Typed",
    "encode_header",
    "lay_out",
    "random_blocks",
    "synthesize",
    "write_gguf",
]

_HOMES: Final = {
    "AsyncOnlySource": "asyncload.testing._sources",
    "DeviceConformance": "asyncload.testing._device_conformance",
    "FaultySource": "asyncload.testing._sources",
    "HostDevice": "asyncload.device",
    "LatencySource": "asyncload.testing._sources",
    "SleepingKernel": "asyncload.testing._cuda_kernel",
    "MetadataValue": "asyncload.testing._gguf_writer",
    "TensorSpec": "asyncload.testing._gguf_writer",
    "ThrottledSource": "asyncload.testing._sources",
    "Typed": "asyncload.testing._gguf_writer",
    "encode_header": "asyncload.testing._gguf_writer",
    "lay_out": "asyncload.testing._gguf_writer",
    "random_blocks": "asyncload.testing._blocks",
    "synthesize": "asyncload.testing._synthesize",
    "write_gguf": "asyncload.testing._gguf_writer",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'asyncload.testing' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted(__all__)
