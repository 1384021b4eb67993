from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncload.errors import OptionsError, PlanError
from asyncload.gguf import Array, GGMLType, Header, ValueType
from asyncload.plan import KVCache, ModelShape, kv_cache

MakeHeader = Callable[[Mapping[str, tuple[GGMLType, tuple[int, ...]]], Mapping[str, Any]], Header]
F16 = 2

LLAMA_8B = {
    "block_count": 32,
    "embedding_length": 4096,
    "attention.head_count": 32,
    "attention.head_count_kv": 8,
    "attention.key_length": 128,
    "attention.value_length": 128,
}


class Model:
    """Headers whose layers have matrices for keys and values of the widths given, or none of these."""

    def __init__(self, make_header: MakeHeader) -> None:
        self._make = make_header

    def __call__(
        self, metadata: Mapping[str, Any], *, arch: str = "llama", layers: int = 2, rows: tuple[int, int] | None = None
    ) -> Header:
        tensors = {f"blk.{layer}.ffn_up.weight": (GGMLType.F16, (48, 16)) for layer in range(layers)}
        for layer in range(layers if rows else 0):
            for name, width in zip("kv", rows or (), strict=True):
                tensors[f"blk.{layer}.attn_{name}.weight"] = GGMLType.F16, (width, 16)
        return self._make(
            tensors, {"general.architecture": arch, **{f"{arch}.{key}": value for key, value in metadata.items()}}
        )


@pytest.fixture(scope="session")
def model(make_header: MakeHeader) -> Model:
    return Model(make_header)


def cache(header: Header | ModelShape, context: int = 1, kv_type: str = "f16", batch: int = 512) -> KVCache:
    return kv_cache(header, context=context, kv_type=kv_type, batch=batch)


class TestFullAttention:
    def test_llama_8b(self, model: Model) -> None:
        header = model(LLAMA_8B, layers=32)
        assert cache(header) == KVCache(131_072, exact=True)
        assert cache(header, 8192) == KVCache(1 << 30, exact=True)

    @pytest.mark.parametrize(
        ("kv_type", "nbytes"),
        [("f32", 4096), ("bf16", 2048), ("fp8", 1024), ("q8_0", 1088), ("q5_1", 768), ("q4_0", 576), ("iq4_nl", 576)],
    )
    def test_types(self, model: Model, kv_type: str, nbytes: int) -> None:
        # keys and values of 512 numbers in each of two layers, half of these in one
        header = model({**LLAMA_8B, "block_count": 2, "attention.head_count_kv": 2})
        assert cache(header, kv_type=kv_type) == KVCache(2 * nbytes // 2, exact=True)

    def test_a_row_that_fills_no_block_takes_one(self, model: Model) -> None:
        header = model({"attention.head_count": 1, "attention.key_length": 33, "attention.value_length": 1}, layers=1)
        assert cache(header, kv_type="q8_0").nbytes == (2 + 1) * 34

    def test_an_unknown_type(self, model: Model) -> None:
        with pytest.raises(OptionsError) as caught:
            cache(model(LLAMA_8B), kv_type="q4_k")
        assert caught.value.option == "kv_type"

    def test_what_is_not_said_follows_from_the_rest(self, model: Model) -> None:
        header = model({"embedding_length": 64, "attention.head_count": 4})
        assert cache(header) == KVCache(2 * (64 + 64) * F16, exact=True)

    def test_keys_and_values_of_different_length(self, model: Model) -> None:
        header = model({**LLAMA_8B, "attention.key_length": 192}, layers=32)
        assert cache(header) == KVCache(32 * 8 * (192 + 128) * F16, exact=True)

    def test_an_array_has_each_layers_own_heads(self, model: Model) -> None:
        # the last layer has no attention
        metadata = {**LLAMA_8B, "block_count": 3, "attention.head_count_kv": [8, 2, 0]}
        assert cache(model(metadata, layers=3)) == KVCache((8 + 2) * 256 * F16, exact=True)

    def test_an_array_of_a_file(self, model: Model) -> None:
        heads = Array(ValueType.INT32, 2, bytearray(struct.pack("<2i", 8, 2)), (0, 8))
        metadata = {**LLAMA_8B, "block_count": 2, "attention.head_count_kv": heads}
        assert cache(model(metadata)) == KVCache((8 + 2) * 256 * F16, exact=True)
        broken = Array(ValueType.STRING, 1, bytearray(struct.pack("<QB", 1, 255)), (0, 9), marks=(0,))
        assert not cache(model({**metadata, "attention.head_count_kv": broken})).exact

    def test_layers_that_are_not_in_the_file_count(self, model: Model) -> None:
        assert cache(model(LLAMA_8B, layers=1)).nbytes == 131_072

    def test_a_shape(self) -> None:
        shape = ModelShape(
            hidden_size=1536,
            layers=28,
            heads=12,
            kv_heads=2,
            vocabulary=1000,
            intermediate_size=8960,
            sequence_length=2048,
        )
        assert cache(shape) == KVCache(28 * 2 * 256 * F16, exact=True)


class TestSlidingWindows:
    GEMMA3_1B: Mapping[str, Any] = {
        "block_count": 26,
        "embedding_length": 1152,
        "attention.head_count": 4,
        "attention.head_count_kv": 1,
        "attention.key_length": 256,
        "attention.value_length": 256,
        "attention.sliding_window": 512,
    }
    A_TOKEN = 2 * 256 * F16

    def test_gemma3_has_five_local_layers_to_a_global_one(self, model: Model) -> None:
        header = model(self.GEMMA3_1B, arch="gemma3", layers=26)
        # layers 5, 11, 17 and 23 hold all; the others the window and the batch that passes it
        expected = (4 * 8192 + 22 * (512 + 256)) * self.A_TOKEN
        assert cache(header, 8192, batch=256) == KVCache(expected, exact=True)

    def test_no_layer_holds_more_than_the_context(self, model: Model) -> None:
        assert cache(model(self.GEMMA3_1B, arch="gemma3", layers=26), 600).nbytes == 26 * 600 * self.A_TOKEN

    def test_a_pattern_by_layer(self, model: Model) -> None:
        metadata = {**self.GEMMA3_1B, "attention.sliding_window_pattern": [True, False] * 13}
        header = model(metadata, arch="unheard-of", layers=26)
        assert cache(header, 8192) == KVCache(13 * (8192 + 1024) * self.A_TOKEN, exact=True)

    def test_a_period_of_a_known_architecture(self, model: Model) -> None:
        metadata = {**self.GEMMA3_1B, "block_count": 8, "attention.sliding_window_pattern": 2}
        header = model(metadata, arch="gemma3", layers=8)
        assert cache(header, 8192) == KVCache(4 * (8192 + 1024) * self.A_TOKEN, exact=True)

    def test_a_period_of_another_is_a_bound(self, model: Model) -> None:
        # layers 3 and 7 if it ends with the global layer, 0 and 4 if it begins with it: three hold at least as much
        metadata = {**self.GEMMA3_1B, "block_count": 8, "attention.sliding_window_pattern": 4}
        found = cache(model(metadata, arch="unheard-of", layers=8), 8192)
        assert found == KVCache((3 * 8192 + 5 * 1024) * self.A_TOKEN, exact=False)

    @pytest.mark.parametrize("pattern", [None, "often", [True] * 3, [2] * 26, 0, -1, 1.5])
    def test_a_pattern_that_is_not_known_counts_in_full(self, model: Model, pattern: object) -> None:
        more = {} if pattern is None else {"attention.sliding_window_pattern": pattern}
        found = cache(model({**self.GEMMA3_1B, **more}, arch="unheard-of", layers=26), 8192)
        short = 3 if pattern == [True] * 3 else 0  # what the array does say counts
        assert found == KVCache((short * 1024 + (26 - short) * 8192) * self.A_TOKEN, exact=False)

    def test_heads_of_another_length_in_sliding_layers_are_a_bound(self, model: Model) -> None:
        metadata = {**self.GEMMA3_1B, "attention.key_length_swa": 512}
        found = cache(model(metadata, arch="gemma3", layers=26), 100)
        assert found == KVCache(26 * 100 * (512 + 256) * F16, exact=False)


class TestBounds:
    """What the metadata does not settle: never less than an engine may need, and never called exact."""

    def test_latent_attention_is_counted_decompressed(self, model: Model) -> None:
        metadata = {
            "block_count": 2,
            "attention.head_count": 128,
            "attention.head_count_kv": 1,
            "attention.key_length": 576,
            "attention.value_length": 512,
            "attention.key_length_mla": 192,
            "attention.value_length_mla": 128,
            "attention.kv_lora_rank": 512,
        }
        assert cache(model(metadata, arch="deepseek2")) == KVCache(2 * 128 * (192 + 128) * F16, exact=False)

    def test_latent_attention_of_few_heads_is_larger_compressed(self, model: Model) -> None:
        metadata = {
            "attention.head_count": 1,
            "attention.key_length": 24,
            "attention.value_length": 16,
            "attention.kv_lora_rank": 64,
        }
        assert cache(model(metadata, layers=1)).nbytes >= (64 + 8) * 2 * F16

    def test_a_recurrent_model_keeps_its_state(self, model: Model) -> None:
        metadata = {
            "block_count": 2,
            "attention.head_count": 0,
            "ssm.conv_kernel": 4,
            "ssm.inner_size": 1536,
            "ssm.state_size": 16,
        }
        found = cache(model(metadata, arch="mamba"), 100_000)
        assert not found.exact
        assert found.nbytes == 2 * 4 * (4 * 1536 + 16 * 1536)

    def test_a_hybrid_model_keeps_both(self, model: Model) -> None:
        metadata = {
            **LLAMA_8B,
            "block_count": 2,
            "attention.head_count_kv": [0, 8],
            "ssm.conv_kernel": 4,
            "ssm.inner_size": 1536,
            "ssm.state_size": 16,
        }
        state = 4 * (4 * 1536 + 16 * 1536)
        assert cache(model(metadata, arch="jamba"), 10) == KVCache(2 * state + 10 * 8 * 256 * F16, exact=False)

    @pytest.mark.parametrize(
        ("metadata", "state"),
        [
            ({"wkv.head_size": 64, "embedding_length": 512}, 512 * (2 + 64)),
            ({"shortconv.l_cache": 3, "embedding_length": 512}, 512 * 3),
        ],
    )
    def test_other_recurrent_layers(self, model: Model, metadata: Mapping[str, Any], state: int) -> None:
        assert cache(model({**metadata, "attention.head_count": 0})) == KVCache(2 * 4 * state, exact=False)

    T5_SMALL: Mapping[str, Any] = {
        "block_count": 6,
        "decoder_block_count": 8,
        "decoder_start_token_id": 0,
        "embedding_length": 512,
        "attention.head_count": 6,
        "attention.key_length": 64,
        "attention.value_length": 64,
    }

    @pytest.mark.parametrize("left_out", [(), ("decoder_start_token_id",), ("attention.head_count",)], ids=str)
    def test_a_decoder_keeps_keys_and_values_of_its_encoder_too(
        self, make_header: MakeHeader, left_out: tuple[str, ...]
    ) -> None:
        # of which it has more layers; heads are as wide as they are, whatever the model's width
        tensors = {
            f"{side}.blk.{layer}.{kind}attn_{part}.weight": (GGMLType.F16, (6 * 64, 512))
            for side, layers, kinds in (("enc", 6, ("",)), ("dec", 8, ("", "cross_")))
            for layer in range(layers)
            for kind in kinds
            for part in "qkv"
        }
        metadata = {f"t5.{key}": value for key, value in self.T5_SMALL.items() if key not in left_out}
        found = cache(make_header(tensors, {"general.architecture": "t5", **metadata}), 100)
        assert found == KVCache(8 * 2 * 100 * 2 * 6 * 64 * F16, exact=False)

    def test_a_layer_of_cross_attention_is_known_by_its_tensors(self, make_header: MakeHeader) -> None:
        tensors = {
            "blk.0.attn_k.weight": (GGMLType.F16, (1024, 16)),
            "blk.0.attn_v.weight": (GGMLType.F16, (1024, 16)),
            "blk.1.cross_attn_k.weight": (GGMLType.F16, (2048, 16)),
            "blk.1.cross_attn_v.weight": (GGMLType.F16, (1024, 16)),
        }
        metadata = {f"mllama.{key}": value for key, value in {**LLAMA_8B, "block_count": 2}.items()}
        found = cache(make_header(tensors, {"general.architecture": "mllama", **metadata}), 10)
        assert found == KVCache(2 * 10 * (2 * 1024 + 2048 + 1024) * F16, exact=False)

    @pytest.mark.parametrize("metadata", [{"ssm.conv_kernel": 4}, {"ssm.inner_size": "wide"}, {"kda.head_dim": 128}])
    def test_a_state_of_unknown_size_is_refused(self, model: Model, metadata: Mapping[str, Any]) -> None:
        with pytest.raises(PlanError, match="give kv_bytes"):
            cache(model({**LLAMA_8B, **metadata}))

    @pytest.mark.parametrize(
        "more",
        [{"attention.shared_kv_layers": 10}, {"nextn_predict_layers": 1}, {"attention.causal": False}],
        ids=str,
    )
    def test_what_may_need_less(self, model: Model, more: Mapping[str, Any]) -> None:
        assert cache(model({**LLAMA_8B, **more}, layers=32)) == KVCache(131_072, exact=False)

    def test_tensors_that_say_more_are_believed(self, model: Model) -> None:
        metadata = {**LLAMA_8B, "block_count": 2, "attention.head_count_kv": 1}
        assert cache(model(metadata, rows=(1024, 512))) == KVCache(2 * (1024 + 512) * F16, exact=False)

    def test_metadata_that_says_more_is_believed(self, model: Model) -> None:
        header = model({**LLAMA_8B, "block_count": 2}, rows=(512, 1024))
        assert cache(header) == KVCache(2 * 2048 * F16, exact=False)

    def test_more_layers_than_any_model_has(self, model: Model) -> None:
        assert cache(model({**LLAMA_8B, "block_count": 100_000})) == KVCache(4096 * 2048 * F16, exact=False)

    def test_tensors_stand_in_for_metadata(self, model: Model) -> None:
        assert cache(model({}, rows=(96, 80))) == KVCache(2 * (96 + 80) * F16, exact=False)

    def test_the_widest_result_stands_in_for_both(self, model: Model) -> None:
        assert cache(model({})) == KVCache(2 * (48 + 48) * F16, exact=False)

    def test_nothing_to_go_by_is_refused(self, model: Model) -> None:
        with pytest.raises(PlanError, match="give kv_bytes"):
            cache(model({"block_count": 3}))

    @pytest.mark.parametrize("key", sorted(LLAMA_8B))
    @pytest.mark.parametrize("value", ["many", -1, 0, 1 << 62, 2.5, True, [], ["a"], float("nan")], ids=str)
    def test_absurd_values(self, model: Model, key: str, value: object) -> None:
        found = cache(model({**LLAMA_8B, "block_count": 2, key: value}, rows=(1024, 1024)))
        assert found.nbytes >= 2 * 2048 * F16
        if key.startswith("attention"):
            assert not found.exact

    @pytest.mark.parametrize("name", [None, 7, [1, 2], "", "gemma3.attention"])
    def test_absurd_architectures(self, make_header: MakeHeader, name: object) -> None:
        tensors = {"blk.0.attn_k.weight": (GGMLType.F16, (8, 8)), "blk.0.attn_v.weight": (GGMLType.F16, (8, 8))}
        assert cache(make_header(tensors, {"general.architecture": name})) == KVCache(32, exact=False)


VALUES = st.one_of(
    st.integers(-(1 << 63), 1 << 64), st.integers(0, 300), st.floats(), st.text(max_size=3), st.booleans()
)
KEYS = [
    *LLAMA_8B,
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attention.kv_lora_rank",
    "attention.key_length_mla",
    "attention.key_length_swa",
    "attention.shared_kv_layers",
    "attention.causal",
    "decoder_block_count",
    "decoder_start_token_id",
    "ssm.conv_kernel",
    "ssm.inner_size",
    "ssm.state_size",
    "wkv.head_size",
    "token_shift_count",
]


@given(
    metadata=st.dictionaries(st.sampled_from(KEYS), VALUES | st.lists(VALUES, max_size=3), max_size=8),
    arch=st.sampled_from(["llama", "gemma3"]),
    context=st.integers(1, 10_000),
)
def test_any_metadata_gives_a_size_or_a_plan_error(
    model: Model, metadata: Mapping[str, Any], arch: str, context: int
) -> None:
    header = model({**LLAMA_8B, **metadata}, arch=arch)
    try:
        smaller, found = cache(header, context), cache(header, context + 1)
    except PlanError:
        return
    assert 0 <= smaller.nbytes <= found.nbytes
