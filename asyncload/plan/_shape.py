"""A model as a handful of numbers, for estimates without a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from asyncload.errors import OptionsError

__all__ = ["ModelShape"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder with grouped-query attention and a gated feed-forward network, as Llama and Qwen2 are.

    ``bytes_per_weight`` is 4 for float32, 0.5625 for Q4_K; ``tied`` where the embedding is the output head, too.
    Biases and the norms of single heads are not counted. Raises ``OptionsError`` for a size that is not positive or
    heads that do not divide the hidden size.
    """

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    intermediate_size: int
    sequence_length: int
    bytes_per_weight: float = 2
    tied: bool = False

    def __post_init__(self) -> None:
        """Checks every field."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "tied" and not 0 < value < float("inf"):
                raise OptionsError(f"{field.name} is {value}, it must be positive", option=field.name)
        if self.hidden_size % self.heads:
            raise OptionsError(f"{self.heads} heads do not divide a width of {self.hidden_size}", option="heads")

    @property
    def head_size(self) -> int:
        """The width of one head's keys and values."""
        return self.hidden_size // self.heads

    @property
    def layer_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The row-major shapes of one layer's tensors, by the names that GGUF gives them."""
        hidden, inner, kv = self.hidden_size, self.intermediate_size, self.kv_heads * self.head_size
        return MappingProxyType(
            {
                "attn_norm": (hidden,),
                "attn_q": (hidden, hidden),
                "attn_k": (kv, hidden),
                "attn_v": (kv, hidden),
                "attn_output": (hidden, hidden),
                "ffn_norm": (hidden,),
                "ffn_gate": (inner, hidden),
                "ffn_up": (inner, hidden),
                "ffn_down": (hidden, inner),
            }
        )

    @property
    def other_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The row-major shapes of the tensors that are no layer's; no ``output`` where that is tied."""
        rows = (self.vocabulary, self.hidden_size)
        shapes: dict[str, tuple[int, ...]] = {"token_embd": rows, "output_norm": (self.hidden_size,)}
        return MappingProxyType(shapes if self.tied else shapes | {"output": rows})
