"""Other ways to bring the same bytes to the same place: those of the peers that are installed here."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from asyncload.gguf import Header

__all__ = ["Peer", "peers"]

_SAMPLE = 64 << 20  # bytes of the model that a slow peer decodes; its time is scaled up


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer's name, what it does once (in seconds for the whole model), a remark, and whether it decodes."""

    name: str
    run: Callable[[], float]
    remark: str = ""
    bf16: bool = False


def peers(file: Path, header: Header, device: str, folder: Path) -> Iterator[Peer]:
    """The peers that are installed, made ready: safetensors gets a file of its own with the same bytes."""
    torch_device = "cpu" if device == "host" else device
    if find_spec("safetensors"):
        same = folder / "same.safetensors"
        _write_safetensors(file, header, same)
        if find_spec("torch"):
            yield Peer(
                "safetensors.torch.load_file",
                _timed(lambda: _synchronized(_module("safetensors.torch").load_file(same, torch_device), torch_device)),
            )
        elif device == "host":
            yield Peer("safetensors.numpy.load_file", _timed(lambda: _module("safetensors.numpy").load_file(same)))
    if find_spec("torch"):
        yield Peer("gguf-py + torch, packed", _timed(lambda: _gguf_packed(file, torch_device)))
        share = min(1.0, _SAMPLE / header.nbytes)
        yield Peer(
            "gguf-py + torch, bf16",
            lambda: _gguf_decoded(file, torch_device),
            f"measured on {share:.0%} of the bytes" if share < 1 else "",
            bf16=True,
        )


def _timed(function: Callable[[], object]) -> Callable[[], float]:
    def run() -> float:
        begin = time.perf_counter()
        result = function()
        seconds = time.perf_counter() - begin
        del result  # freeing is not loading
        return seconds

    return run


def _module(name: str) -> Any:
    return importlib.import_module(name)


def _write_safetensors(file: Path, header: Header, target: Path) -> None:
    import numpy as np

    data = np.memmap(file, np.uint8, "r")
    tensors = {info.name: data[info.offset : info.offset + info.nbytes] for info in header.tensors.values()}
    _module("safetensors.numpy").save_file(tensors, target)


def _synchronized(result: Any, device: str) -> Any:
    if device != "cpu":
        _module("torch").cuda.synchronize(device)
    return result


def _gguf_packed(file: Path, device: str) -> Any:
    """Every tensor's blocks, copied out of gguf-py's mapping of the file (a mapping alone would have read nothing)."""
    torch = _module("torch")
    tensors = {
        tensor.name: torch.tensor(tensor.data, device=device) for tensor in _module("gguf").GGUFReader(file).tensors
    }
    return _synchronized(tensors, device)


def _gguf_decoded(file: Path, device: str) -> float:
    """Seconds for the whole model: opening it, and decoding by bytes as long as the sample took."""
    torch, gguf = _module("torch"), _module("gguf")
    begin = time.perf_counter()
    tensors = gguf.GGUFReader(file).tensors
    opened = time.perf_counter()
    nbytes, results = 0, list[Any]()
    for tensor in tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        values = values if values.flags.writeable else values.copy()  # float32 comes as the mapped file itself
        results.append(torch.from_numpy(values).to(device=device, dtype=torch.bfloat16))
        nbytes += tensor.n_bytes
        if nbytes >= _SAMPLE:
            break
    _synchronized(results, device)
    decoding = time.perf_counter() - opened
    return opened - begin + decoding * sum(int(tensor.n_bytes) for tensor in tensors) / max(nbytes, 1)
