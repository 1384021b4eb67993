"""What real models consist of: their tensors, and the types that quantizing gives them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Literal

from asyncload.gguf import GGMLType

__all__ = ["PRESETS", "QUANTS", "Architecture", "tensors_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The sizes of a model: ``rows`` of its embedding; ``tied`` if that is its output, too.

    ``family`` is what ``general.architecture`` says; ``window`` the tokens that a Gemma's sliding layers see.
    """

    title: str
    family: Literal["llama", "gemma3", "qwen3"] = "llama"
    layers: int
    embedding: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_size: int
    rows: int
    context: int
    tied: bool = False
    window: int = 0

    def with_layers(self, layers: int | None) -> Architecture:
        """The same with another number of layers; None changes nothing."""
        return self if layers is None else replace(self, layers=layers)


# Llama 3.1 8B and Llama 3.2 1B; Qwen3 32B, which has many tensors; one whose rows are mostly no multiple of 256, as
# Gemma 3 270M's are; and a Gemma 3 of which one layer looks at everything and the others slide.
PRESETS: Final[Mapping[str, Architecture]] = MappingProxyType(
    {
        "llama-8b": Architecture(
            title="Llama 3.1 8B",
            layers=32,
            embedding=4096,
            feed_forward=14336,
            heads=32,
            kv_heads=8,
            head_size=128,
            rows=128256,
            context=131072,
        ),
        "llama-1b": Architecture(
            title="Llama 3.2 1B",
            layers=16,
            embedding=2048,
            feed_forward=8192,
            heads=32,
            kv_heads=8,
            head_size=64,
            rows=128256,
            context=131072,
            tied=True,
        ),
        "qwen3-32b": Architecture(
            title="Qwen3 32B",
            family="qwen3",
            layers=64,
            embedding=5120,
            feed_forward=25600,
            heads=64,
            kv_heads=8,
            head_size=128,
            rows=151936,
            context=40960,
        ),
        "tiny": Architecture(
            title="tiny Llama",
            layers=4,
            embedding=320,
            feed_forward=768,
            heads=5,
            kv_heads=1,
            head_size=64,
            rows=1000,
            context=2048,
        ),
        "tiny-gemma": Architecture(
            title="tiny Gemma 3",
            family="gemma3",
            layers=7,
            embedding=320,
            feed_forward=768,
            heads=4,
            kv_heads=2,
            head_size=64,
            rows=1000,
            context=2048,
            tied=True,
            window=16,
        ),
    }
)

# By recipe: the type of most weights, that of the output, that of the tensors which get more bits, and llama.cpp's
# number for the whole (general.file_type).
_Recipe = tuple[GGMLType, GGMLType, GGMLType, int]
QUANTS: Final[Mapping[str, _Recipe]] = MappingProxyType(
    {
        "F32": (GGMLType.F32, GGMLType.F32, GGMLType.F32, 0),
        "F16": (GGMLType.F16, GGMLType.F16, GGMLType.F16, 1),
        "BF16": (GGMLType.BF16, GGMLType.BF16, GGMLType.BF16, 32),
        "Q4_0": (GGMLType.Q4_0, GGMLType.Q6_K, GGMLType.Q4_0, 2),
        "Q8_0": (GGMLType.Q8_0, GGMLType.Q8_0, GGMLType.Q8_0, 7),
        "Q4_K_M": (GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.Q6_K, 15),
        # Q4_K_M and, beside its tensors, one of every type that there is.
        "all": (GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.Q6_K, 15),
    }
)

# What llama.cpp takes where rows are no multiple of 256.
_FALLBACK: Final = {GGMLType.Q4_K: GGMLType.Q5_0, GGMLType.Q6_K: GGMLType.Q8_0}

_Tensor = tuple[str, GGMLType, tuple[int, ...]]


def tensors_of(model: Architecture, quant: str) -> list[_Tensor]:
    """The names, types and row-major shapes of a quantized model's tensors, in the order that llama.cpp writes them."""
    recipe = QUANTS[quant]
    tensors = [(name, _type_of(name, shape, model, recipe), shape) for name, shape in _shapes(model)]
    if quant == "all":
        for number, kind in enumerate(GGMLType):
            row = max(kind.block_size, 64) * (1 + number % 3)
            tensors.append((f"blk.{number % model.layers}.{kind.name.lower()}.weight", kind, (5 + number % 4, row)))
    return sorted(tensors, key=lambda tensor: (_layer_of(tensor[0]), tensor[0]))


def _shapes(model: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, kv_width, inner = model.heads * model.head_size, model.kv_heads * model.head_size, model.feed_forward
    yield "token_embd.weight", (model.rows, model.embedding)
    if model.family == "llama":
        yield "rope_freqs.weight", (model.head_size // 2,)
    yield "output_norm.weight", (model.embedding,)
    if not model.tied:
        yield "output.weight", (model.rows, model.embedding)
    of_layer = {
        "attn_norm": (model.embedding,),
        "attn_q": (width, model.embedding),
        "attn_k": (kv_width, model.embedding),
        "attn_v": (kv_width, model.embedding),
        "attn_output": (model.embedding, width),
        "ffn_norm": (model.embedding,),
        "ffn_gate": (inner, model.embedding),
        "ffn_up": (inner, model.embedding),
        "ffn_down": (model.embedding, inner),
    }
    if model.family != "llama":
        of_layer |= {"attn_q_norm": (model.head_size,), "attn_k_norm": (model.head_size,)}
    if model.family == "gemma3":
        of_layer |= {
            "post_attention_norm": (model.embedding,),
            "post_ffw_norm": (model.embedding,),
        }
    for layer in range(model.layers):
        for name, shape in of_layer.items():
            yield f"blk.{layer}.{name}.weight", shape


def _layer_of(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("blk.") else -1


def _type_of(name: str, shape: tuple[int, ...], model: Architecture, recipe: _Recipe) -> GGMLType:
    if len(shape) == 1:
        return GGMLType.F32
    kind, of_output, of_more, _ = recipe
    if name == ("token_embd.weight" if model.tied else "output.weight"):
        kind = of_output
    elif ".attn_v." in name or ".ffn_down." in name:
        kind = of_more if _gets_more_bits(_layer_of(name), model.layers) else kind
    return kind if shape[-1] % kind.block_size == 0 else _FALLBACK[kind]


def _gets_more_bits(layer: int, layers: int) -> bool:
    """Whether llama.cpp's ``use_more_bits`` picks the layer: the first and last eighth, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2  # noqa: PLR2004
