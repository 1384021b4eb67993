"""Small models of layers, their content, and what tests do with a layer."""

from __future__ import annotations

from collections.abc import AsyncIterable
from functools import partial
from pathlib import Path
from typing import Any

from asyncload.device import Device, Stream
from asyncload.layers import Layer
from asyncload.loader import LayerStream, Loader
from asyncload.options import Options
from asyncload.testing import write_layers
from asyncload.threads import run_in_thread

SMALL = Options(chunk_size=64 << 10, staging=512 << 10, threads=2, streams=2)
Content = dict[str, bytes]


async def make_model(path: Path, layers: int, *, uneven: bool, dtype: str = "f16") -> tuple[Path, Content]:
    """The path, and what each tensor is as ``dtype``."""
    return path, await run_in_thread(partial(write_layers, path, layers, uneven=uneven, dtype=dtype))


def layers_only(content: Content) -> Content:
    return {name: data for name, data in content.items() if name.startswith("blk.")}


def open_stream(loader: Loader, path: Any, **more: Any) -> LayerStream:
    """A stream in which all layers pass through two slots, unless ``more`` says something else."""
    arguments: dict[str, Any] = {"dtype": "f16", "allow": ["stream"], "workspace": 0, "kv_bytes": 0, **more}
    return loader.stream(path, **arguments)


def take(layer: Layer) -> Content:
    """Uses a layer on the host, and has its content."""
    with layer.on():
        assert all(tensor.name == f"blk.{layer.number}.{name}" for name, tensor in layer.items())
        return {tensor.name: tensor.numpy().tobytes() for tensor in layer.values()}


async def sweep(layers: AsyncIterable[Layer]) -> tuple[list[int], Content]:
    """The numbers of one sweep's layers in the order in which they came, and their content."""
    numbers: list[int] = []
    content: Content = {}
    async for layer in layers:
        numbers.append(layer.number)
        content |= take(layer)
    return numbers, content


def finish(device: Device, stream: Stream) -> None:
    """Waits for a stream's work."""
    device.attach()
    stream.record().synchronize()
