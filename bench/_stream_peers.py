"""Other ways to run a model whose weights stay in host memory: accelerate, diffusers and RamTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import Any, Final

__all__ = ["PEERS", "Batch"]

Forward = Callable[[Any], object]


class Batch:
    """``tokens`` rows of numbers on the device, and what a layer does with them."""

    def __init__(self, tokens: int, width: int) -> None:
        torch: Any = import_module("torch")
        self.tokens = tokens
        self._torch = torch
        self.x = self._random(tokens, width)

    def matrices(self, inner: int) -> tuple[Any, Any]:
        """A layer's two matrices, on the device."""
        width = self.x.shape[1]
        return self._random(inner, width), self._random(width, inner)

    def _random(self, *shape: int) -> Any:
        return self._torch.randn(*shape, device="cuda", dtype=self._torch.bfloat16)

    def apply(self, up: Any, down: Any) -> Any:
        """A layer's work."""
        linear = self._torch.nn.functional.linear
        return linear(linear(self.x, up), down)


def _model(width: int, inner: Sequence[int]) -> Any:
    """The layers as a torch module in host memory, a block each, one after the other."""
    torch: Any = import_module("torch")

    def linear(inputs: int, outputs: int) -> Any:
        layer = torch.nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16, device="meta").to_empty(device="cpu")
        rows = layer.weight.data.view(outputs, -1, 64)
        rows.copy_((torch.randn(outputs, 1, 64) / inputs**0.5).to(torch.bfloat16).expand_as(rows))
        return layer

    blocks = [torch.nn.Sequential(linear(width, size), linear(size, width)) for size in inner]
    return torch.nn.Sequential(torch.nn.Sequential(*blocks)).requires_grad_(requires_grad=False).eval()


def _without_grad(model: Any) -> Forward:
    torch: Any = import_module("torch")

    def forward(x: Any) -> object:
        with torch.no_grad():
            return model(x)

    return forward


def _accelerate(width: int, inner: Sequence[int]) -> Forward:
    model = _model(width, inner)
    import_module("accelerate").cpu_offload(model, execution_device="cuda:0")
    return _without_grad(model)


def _diffusers(width: int, inner: Sequence[int]) -> Forward:
    model, torch = _model(width, inner), import_module("torch")
    import_module("diffusers.hooks").apply_group_offloading(
        model,
        onload_device=torch.device("cuda:0"),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=True,
    )
    return _without_grad(model)


def _ramtorch(width: int, inner: Sequence[int]) -> Forward:
    model = import_module("ramtorch.helpers").replace_linear_with_ramtorch(_model(width, inner), device="cuda:0")
    return _without_grad(model)


#: By name, what makes the forward pass of a model of some width and the layers' inner widths.
PEERS: Final[Mapping[str, Callable[[int, Sequence[int]], Forward]]] = MappingProxyType(
    {"accelerate cpu_offload": _accelerate, "diffusers group offloading": _diffusers, "RamTorch": _ramtorch}
)
