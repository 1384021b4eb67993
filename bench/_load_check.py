"""Whether different loaders made the same bfloat16 weights of one file, bit for bit."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncload import Options, Tensor
from asyncload.blocking import Loader, read_header
from asyncload.device import open_device
from asyncload.quant import DType
from bench.demo import download

__all__ = ["Check", "check_against_gguf", "check_peer"]


@dataclass(frozen=True, slots=True)
class Check:
    """How many tensors of a loader were compared with another's, and the names of those that differ."""

    against: str
    tensors: int
    different: list[str]

    def __str__(self) -> str:
        """Says it for a table."""
        if self.different:
            return f"{len(self.different)} of {self.tensors} tensors DIFFERENT from {self.against}"
        return f"{self.tensors} tensors as {self.against}"


def check_against_gguf(file: Path, device: str, options: Options) -> Check:
    """Compares what asyncload makes of the smallest tensor of each type with gguf-py's decoding, rounded by gguf-py."""
    import gguf

    largest_first = sorted(read_header(file).tensors.values(), key=lambda info: -info.nbytes)
    names = {info.type: info.name for info in largest_first if not info.type.integer}
    references = {str(tensor.name): tensor for tensor in gguf.GGUFReader(file).tensors}
    opened = open_device(device)
    with (
        Loader(opened, options=options) as loader,
        loader.load(file, dtype="bf16", select=list(names.values())) as model,
    ):
        different = [
            tensor.name
            for tensor in model.values()
            if tensor.dtype is not DType.BFLOAT16 or download(opened, tensor) != expected(references[tensor.name])
        ]
        return Check("gguf-py", len(model), different)


def expected(reference: Any) -> bytes:
    """A tensor's weights in bfloat16 by gguf-py."""
    import gguf

    weights = gguf.dequantize(reference.data, reference.tensor_type)
    rounded: bytes = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.BF16).tobytes()
    return rounded


def check_peer(tensors: Mapping[str, Any], file: Path, device: str, options: Options) -> Check:
    """Compares a peer's torch tensors with asyncload's, on the device where both are."""
    different: list[str] = []
    with (
        Loader(device, options=options) as loader,
        loader.tensors(file, dtype="bf16", select=list(tensors)) as loaded,
    ):
        for tensor in loaded:
            if not _same(tensor, tensors[tensor.name]):
                different.append(tensor.name)
            tensor.close()
    return Check("asyncload", len(tensors), different)


def _same(ours: Tensor, theirs: Any) -> bool:
    torch: Any = importlib.import_module("torch")
    bits = torch.from_dlpack(ours).view(torch.int16)
    return bool(theirs.dtype is torch.bfloat16 and torch.equal(bits, theirs.view(torch.int16)))
