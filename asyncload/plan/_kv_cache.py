"""How large the cache of keys and values gets, from a model's own metadata.

The keys are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and of the ``gguf`` package; what they
mean for each layer (which layers slide, the size of a recurrent state) is llama.cpp's ``llama-hparams.cpp``. Metadata
is hostile input: what is missing or absurd makes the result a bound, or a ``PlanError`` where none can be given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from asyncload.errors import OptionsError, PlanError
from asyncload.gguf import GGMLType, Header
from asyncload.plan._metadata import MOST, ArchitectureMetadata, item
from asyncload.plan._shape import ModelShape

__all__ = ["KV_TYPES", "KVCache", "kv_cache"]

# Numbers a block and bytes a block; the ggml types are those that llama.cpp takes for its cache.
KV_TYPES: Final[Mapping[str, tuple[int, int]]] = MappingProxyType(
    {
        kind.name.lower(): (kind.block_size, kind.type_size)
        for kind in (
            GGMLType.F32,
            GGMLType.F16,
            GGMLType.BF16,
            GGMLType.Q8_0,
            GGMLType.Q5_1,
            GGMLType.Q5_0,
            GGMLType.Q4_1,
            GGMLType.Q4_0,
            GGMLType.IQ4_NL,
        )
    }
    | {"fp8": (1, 1)}
)
# One layer in so many has attention over everything, the last of each period; the others slide. Architectures whose
# files say the window, and mostly not the period.
_PERIODS: Final = {"gemma2": 2, "gemma3": 6, "gemma3n": 5, "cohere2": 4, "gpt-oss": 2}
_MOST_LAYERS: Final = 4096
# Metadata under which some layers keep a state instead of keys and values.
_RECURRENT: Final = {"ssm", "wkv", "shortconv", "kda"}


@dataclass(frozen=True, slots=True)
class KVCache:
    """The bytes of a cache; unless ``exact``, an upper bound."""

    nbytes: int
    exact: bool


def kv_cache(model: Header | ModelShape, *, context: int, kv_type: str, batch: int) -> KVCache:
    """The cache for ``context`` tokens, keys and values of one token in a layer being rows of ``kv_type``.

    A layer takes ``kv_heads * (key_length + value_length)`` numbers a token. A layer with a sliding window keeps the
    window and the ``batch`` of tokens that passes it at once. A recurrent state is one sequence's, in float32. A layer
    that looks at what an encoder gave keeps keys and values of that, too, of up to ``context`` tokens.

    Exact for attention over keys and values that the metadata describes in full. A bound, in which nothing is shared or
    compressed, for latent attention (``attention.kv_lora_rank``, which engines store in either form), for layers that
    may keep a recurrent state (they are counted as both), for decoders behind an encoder (all their layers are taken to
    look at it, and engines may make these keys and values anew instead of keeping them), and wherever metadata is
    missing, absurd, or at odds with the tensors' shapes. Raises ``OptionsError`` for an unknown ``kv_type``,
    ``PlanError`` where there is no bound.
    """
    if kv_type not in KV_TYPES:
        raise OptionsError(f"no cache type is called {kv_type!r}: use one of {', '.join(KV_TYPES)}", option="kv_type")
    if isinstance(model, ModelShape):
        width = model.kv_heads * model.head_size
        return KVCache(2 * _row_nbytes(kv_type, width) * context * model.layers, exact=True)
    metadata = ArchitectureMetadata(model.metadata)
    layers = _Layers(model, metadata)
    window = metadata.number("attention.sliding_window")
    nbytes = 0
    for layer in layers.numbers:
        tokens = min(context, window + batch) if window and layers.slides(layer) else context
        tokens += context if layers.cross else 0
        key, value = layers.widths(layer)
        nbytes += (_row_nbytes(kv_type, key) + _row_nbytes(kv_type, value)) * tokens + layers.state_nbytes()
    return KVCache(nbytes, metadata.trusted)


def _row_nbytes(kv_type: str, width: int) -> int:
    numbers, nbytes = KV_TYPES[kv_type]
    return -(-width // numbers) * nbytes


class _Layers:
    """What each layer keeps of a token."""

    def __init__(self, header: Header, metadata: ArchitectureMetadata) -> None:
        self._header = header
        self._metadata = metadata
        self._recurrent = sorted(metadata.groups() & _RECURRENT)
        self._latent = metadata.raw("attention.kv_lora_rank") is not None
        decoder = ("decoder_block_count", "decoder_start_token_id")  # beside an encoder
        self.cross = any(metadata.raw(key) is not None for key in decoder) or any(
            ".cross_attn_" in name for name in header.tensors
        )
        self.numbers = set(header.layers)
        count = max((metadata.number(key) or 0 for key in ("block_count", "decoder_block_count")), default=0)
        self.numbers |= set(range(min(count, _MOST_LAYERS)))  # also those that are not in this file
        others = ("attention.shared_kv_layers", "nextn_predict_layers")  # whose cache may be smaller
        if (
            self._recurrent
            or self._latent
            or self.cross
            or any(metadata.number(key) for key in others)
            or metadata.raw("attention.causal") is False
            or (self.numbers and not header.layers)
            or count > _MOST_LAYERS
        ):
            metadata.trusted = False

    def slides(self, layer: int) -> bool:
        """Whether the layer is known to look no further back than the sliding window."""
        metadata = self._metadata
        pattern = metadata.raw("attention.sliding_window_pattern")
        if isinstance(pattern, Sequence) and not isinstance(pattern, str):
            value = item(pattern, layer)
            if isinstance(value, int) and value in (0, 1):
                return bool(value)
        else:
            known = _PERIODS.get(metadata.architecture)
            period = known if pattern is None else metadata.number("attention.sliding_window_pattern")
            if period:
                metadata.trusted = metadata.trusted and known is not None
                # some architectures not listed begin with the layer that looks at everything
                return layer % period != period - 1 and (layer > 0 or known is not None)
        metadata.trusted = False
        return False

    def widths(self, layer: int) -> tuple[int, int]:
        """The numbers of a token's keys and of its values."""
        return self._width(layer, "key", "attn_k"), self._width(layer, "value", "attn_v")

    def _width(self, layer: int, name: str, tensor: str) -> int:
        metadata = self._metadata
        heads = metadata.number("attention.head_count", layer)
        kv_heads = heads
        if not self._latent and metadata.raw("attention.head_count_kv") is not None:
            kv_heads = metadata.number("attention.head_count_kv", layer)
        length = self._length(layer, name, heads)
        stored = max(self._rows(layer, tensor), self._rows(layer, f"cross_{tensor}"))
        if kv_heads == 0 and self._per_layer and not stored:
            return 0  # the array says that this layer has no attention, and it has no tensors for it
        if not kv_heads or not length or kv_heads * length > MOST:
            metadata.trusted = False
            return stored or self._widest(layer)
        width = kv_heads * length
        if self._latent:  # of few heads, the compressed form is the larger one
            return max(width, (metadata.number("attention.kv_lora_rank") or 0) + length)
        if stored not in (0, width) or heads == 0:
            metadata.trusted = False
        return max(stored, width)

    @property
    def _per_layer(self) -> bool:
        value = self._metadata.raw("attention.head_count_kv")
        return isinstance(value, Sequence) and not isinstance(value, str)

    def _length(self, layer: int, name: str, heads: int | None) -> int:
        """The length of one head's keys or values, the largest that the metadata speaks of; 0 if it does not."""
        metadata = self._metadata
        length = metadata.number(f"attention.{name}_length_mla", layer) if self._latent else None
        if not length:
            length = metadata.number(f"attention.{name}_length", layer)
        if length is None and heads and metadata.raw(f"attention.{name}_length") is None:
            length = (metadata.number("embedding_length") or 0) // heads
        of_sliding = metadata.number(f"attention.{name}_length_swa", layer)
        if of_sliding not in (None, length):
            metadata.trusted = False
        return max(length or 0, of_sliding or 0)

    def _rows(self, layer: int, tensor: str) -> int:
        """The rows of a matrix of the layer, of a decoder's where that stands beside an encoder; 0 if it has none."""
        names = (f"{decoder}blk.{layer}.{tensor}.weight" for decoder in ("", "dec."))
        found = (self._header.tensors.get(name) for name in names)
        return max((info.shape[0] for info in found if info is not None and info.shape), default=0)

    def _widest(self, layer: int) -> int:
        """More than a layer's keys can be: its widest result, 0 where a recurrent layer has no attention at all."""
        matrices = [info for info in self._header.layers.get(layer, ()) if len(info.shape) > 1]
        if self._recurrent and matrices and not any(".attn_" in info.name for info in matrices):
            return 0
        widest = max((max(info.shape[-2:]) for info in matrices), default=0)
        if not widest:
            raise PlanError(f"neither metadata nor tensors say how large the cache of layer {layer} is: give kv_bytes")
        return widest

    def state_nbytes(self) -> int:
        """The bytes of one layer's recurrent state for one sequence, the largest that the metadata speaks of."""
        sizes = [_STATES[kind](self._metadata) for kind in self._recurrent if kind in _STATES]
        if len(sizes) != len(self._recurrent) or None in sizes:
            raise PlanError("the metadata does not say how large the recurrent state is: give kv_bytes")
        return 4 * max((size for size in sizes if size is not None), default=0)


def _ssm_state(metadata: ArchitectureMetadata) -> int | None:
    """Mamba's state and the columns of its convolution (one of which engines leave out)."""
    kernel, inner = metadata.number("ssm.conv_kernel"), metadata.number("ssm.inner_size")
    state, groups = metadata.number("ssm.state_size"), metadata.number("ssm.group_count")
    if kernel is None or inner is None or state is None:
        return None
    return kernel * (inner + 2 * (groups or 0) * state) + state * inner


def _wkv_state(metadata: ArchitectureMetadata) -> int | None:
    """RWKV's shifted tokens, two where the metadata does not count them, and its state."""
    width, size = metadata.number("embedding_length"), metadata.number("wkv.head_size")
    if width is None or size is None:
        return None
    return width * ((metadata.number("token_shift_count") or 2) + size)


def _shortconv_state(metadata: ArchitectureMetadata) -> int | None:
    """The columns of LFM2's convolution (one of which engines leave out)."""
    width, columns = metadata.number("embedding_length"), metadata.number("shortconv.l_cache")
    return None if width is None or columns is None else width * columns


_STATES: Final = {"ssm": _ssm_state, "wkv": _wkv_state, "shortconv": _shortconv_state}
