"""Gemma 3 in torch, one layer at a time: whatever holds the weights hands them to it layer by layer.

What it computes is what llama.cpp computes for this architecture (``llama.cpp/src/models/gemma3.cpp``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from asyncload.gguf import Header

__all__ = ["Config", "KVCache", "Weights", "embed", "predict", "run_layer"]

#: Tensors of one layer, or of none, by their names in it: ``"attn_q.weight"``.
Weights = Mapping[str, Tensor]

_PERIOD: Final = 6  # one layer in so many, the last of each period, looks at everything; the others slide


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What the metadata say of the model."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    window: int
    epsilon: float
    rope_base: float
    sliding_rope_base: float

    @classmethod
    def of(cls, header: Header) -> Config:
        """Reads a header; raises ``ValueError`` for another architecture, and for a Gemma 3 with scaled positions."""
        metadata: Mapping[str, Any] = header.metadata
        architecture = metadata.get("general.architecture")
        if architecture != "gemma3" or any(key.startswith("gemma3.rope.scaling.") for key in metadata):
            raise ValueError(f"this example runs Gemma 3 without scaled positions, not {architecture!r} as it is here")
        head_size = metadata["gemma3.attention.key_length"]
        if metadata["gemma3.attention.value_length"] != head_size:
            raise ValueError("keys and values are expected to be of one length")
        return cls(
            layers=metadata["gemma3.block_count"],
            width=metadata["gemma3.embedding_length"],
            heads=metadata["gemma3.attention.head_count"],
            kv_heads=metadata["gemma3.attention.head_count_kv"],
            head_size=head_size,
            window=metadata["gemma3.attention.sliding_window"],
            epsilon=metadata["gemma3.attention.layer_norm_rms_epsilon"],
            rope_base=metadata["gemma3.rope.freq_base"],
            sliding_rope_base=metadata.get("gemma3.rope.freq_base_swa", 10000.0),
        )

    def slides(self, layer: int) -> bool:
        """Whether the layer looks no further back than the window."""
        return layer % _PERIOD != _PERIOD - 1


class KVCache:
    """Keys and values of one sequence, for all layers in one tensor, ``memory``.

    A layer that looks at everything has room for ``context`` tokens; one that slides for the window and the ``batch``
    tokens that pass at once. ``length`` is the number of tokens of which all layers have keys and values.
    """

    def __init__(self, config: Config, *, context: int, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        self._window = config.window
        sliding = min(context, config.window + min(context, batch))
        rooms = [sliding if config.slides(layer) else context for layer in range(config.layers)]
        token = 2 * config.kv_heads * config.head_size
        self.memory = torch.empty(sum(rooms) * token, dtype=dtype, device=device)
        shares = self.memory.split([room * token for room in rooms])
        self._layers = [share.view(2, config.kv_heads, -1, config.head_size) for share in shares]
        self._held = [0] * config.layers
        self.length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds those of the newest tokens, (kv_heads, tokens, head_size); returns all that the layer holds."""
        rows, held, count = self._layers[layer], self._held[layer], keys.shape[1]
        if held + count > rows.shape[2]:
            kept = self._window - 1  # what the first of the new tokens still sees
            rows[:, :, :kept] = rows[:, :, held - kept : held].clone()
            held = kept
        rows[0, :, held : held + count] = keys
        rows[1, :, held : held + count] = values
        self._held[layer] = held + count
        return rows[0, :, : held + count], rows[1, :, : held + count]


def embed(config: Config, weights: Weights, tokens: Tensor) -> Tensor:
    """Token ids (tokens) to what the first layer takes: float32, (tokens, width)."""
    return weights["token_embd.weight"][tokens].float() * math.sqrt(config.width)


def run_layer(config: Config, layer: int, weights: Weights, hidden: Tensor, cache: KVCache) -> Tensor:
    """One layer's work on the tokens behind those in the cache, (tokens, width); their keys and values go into it."""
    attended = _attend(config, layer, weights, _norm(config, hidden, weights["attn_norm.weight"]), cache)
    hidden = hidden + _norm(config, attended, weights["post_attention_norm.weight"])
    normed = _norm(config, hidden, weights["ffn_norm.weight"])
    gate = functional.gelu(_multiply(normed, weights["ffn_gate.weight"]), approximate="tanh")
    result = _multiply(gate * _multiply(normed, weights["ffn_up.weight"]), weights["ffn_down.weight"])
    return hidden + _norm(config, result, weights["post_ffw_norm.weight"])


def predict(config: Config, weights: Weights, hidden: Tensor) -> Tensor:
    """What comes out of the last layer to the next token's logits, (tokens, vocabulary); the head is the embedding."""
    return _multiply(_norm(config, hidden, weights["output_norm.weight"]), weights["token_embd.weight"])


def _attend(config: Config, layer: int, weights: Weights, normed: Tensor, cache: KVCache) -> Tensor:
    count, slides = len(normed), config.slides(layer)
    positions = torch.arange(cache.length, cache.length + count, device=normed.device)
    base = config.sliding_rope_base if slides else config.rope_base

    def heads(name: str) -> Tensor:  # (heads, tokens, head_size)
        return _multiply(normed, weights[f"{name}.weight"]).view(count, -1, config.head_size).transpose(0, 1)

    queries = _rotate(_norm(config, heads("attn_q"), weights["attn_q_norm.weight"]), positions, base)
    keys = _rotate(_norm(config, heads("attn_k"), weights["attn_k_norm.weight"]), positions, base)
    keys, values = cache.append(layer, keys, heads("attn_v"))
    # What the cache holds ends with the newest token; how far back each key lies of each query:
    back = positions[:, None] - torch.arange(keys.shape[1], device=normed.device) - (positions[-1] + 1 - keys.shape[1])
    seen = (back >= 0) & (back < config.window) if slides else back >= 0
    result = functional.scaled_dot_product_attention(
        queries[None].to(keys.dtype), keys[None], values[None], attn_mask=seen, enable_gqa=True
    )  # scaled by the square root of the head's size
    return _multiply(result[0].transpose(0, 1).reshape(count, -1), weights["attn_output.weight"])


def _rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotary positions: the first half of each head's numbers are the real, the second half the imaginary parts."""
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = positions[:, None] * frequencies
    cosine, sine, (real, imaginary) = angles.cos(), angles.sin(), x.split(half, dim=-1)
    return torch.cat((real * cosine - imaginary * sine, imaginary * cosine + real * sine), dim=-1)


def _norm(config: Config, x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm; Gemma's weights count from one, and the file has them with that added."""
    return functional.rms_norm(x, weight.shape, weight, config.epsilon)


def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    """A matrix product in the weight's dtype; everything between the products is float32."""
    return functional.linear(x.to(weight.dtype), weight).float()
