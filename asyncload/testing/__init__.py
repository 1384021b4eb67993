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
    from asyncload.testing._device_proxy import DeviceProxy, StreamProxy
    from asyncload.testing._gguf_writer import MetadataValue, TensorSpec, Typed, encode_header, lay_out, write_gguf
    from asyncload.testing._layer_conformance import LayerConformance
    from asyncload.testing._layer_model import write_layers
    from asyncload.testing._layer_rig import (
        LayerConsumer,
        LayerRig,
        NativeRaceDevice,
        RaceDevice,
        Wait,
        differences,
    )
    from asyncload.testing._layer_rig_cuda import cuda_rig
    from asyncload.testing._layer_rig_host import host_rig
    from asyncload.testing._sources import AsyncOnlySource, FaultySource, LatencySource, ThrottledSource
    from asyncload.testing._synthesize import synthesize

__all__ = [
    "AsyncOnlySource",
    "DeviceConformance",
    "DeviceProxy",
    "FaultySource",
    "HostDevice",
    "LatencySource",
    "LayerConformance",
    "LayerConsumer",
    "LayerRig",
    "MetadataValue",
    "NativeRaceDevice",
    "RaceDevice",
    "SleepingKernel",
    "StreamProxy",
    "TensorSpec",
    "ThrottledSource",
    "Typed",
    "Wait",
    "cuda_rig",
    "differences",
    "encode_header",
    "host_rig",
    "lay_out",
    "random_blocks",
    "synthesize",
    "write_gguf",
    "write_layers",
]

_HOMES: Final = {
    "AsyncOnlySource": "asyncload.testing._sources",
    "DeviceConformance": "asyncload.testing._device_conformance",
    "DeviceProxy": "asyncload.testing._device_proxy",
    "FaultySource": "asyncload.testing._sources",
    "HostDevice": "asyncload.device",
    "LatencySource": "asyncload.testing._sources",
    "LayerConformance": "asyncload.testing._layer_conformance",
    "LayerConsumer": "asyncload.testing._layer_rig",
    "LayerRig": "asyncload.testing._layer_rig",
    "MetadataValue": "asyncload.testing._gguf_writer",
    "NativeRaceDevice": "asyncload.testing._layer_rig",
    "RaceDevice": "asyncload.testing._layer_rig",
    "SleepingKernel": "asyncload.testing._cuda_kernel",
    "StreamProxy": "asyncload.testing._device_proxy",
    "TensorSpec": "asyncload.testing._gguf_writer",
    "ThrottledSource": "asyncload.testing._sources",
    "Typed": "asyncload.testing._gguf_writer",
    "Wait": "asyncload.testing._layer_rig",
    "cuda_rig": "asyncload.testing._layer_rig_cuda",
    "differences": "asyncload.testing._layer_rig",
    "encode_header": "asyncload.testing._gguf_writer",
    "host_rig": "asyncload.testing._layer_rig_host",
    "lay_out": "asyncload.testing._gguf_writer",
    "random_blocks": "asyncload.testing._blocks",
    "synthesize": "asyncload.testing._synthesize",
    "write_gguf": "asyncload.testing._gguf_writer",
    "write_layers": "asyncload.testing._layer_model",
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
