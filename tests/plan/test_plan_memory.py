from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from asyncload.errors import DoesNotFitError, OptionsError, PlanError, UnsupportedQuantError
from asyncload.gguf import GGMLType, Header
from asyncload.memory import Purpose
from asyncload.options import Options
from asyncload.plan import (
    Decode,
    Mode,
    ModelShape,
    Placement,
    Plan,
    estimate_full,
    estimate_layer,
    estimate_prefill_cache,
    estimate_streaming,
    plan_load,
    plan_memory,
    workspace_nbytes,
)
from asyncload.plan._fit import spread

MakeHeader = Callable[[Mapping[str, tuple[GGMLType, tuple[int, ...]]], Mapping[str, Any]], Header]

MODES: tuple[Mode, ...] = ("full", "hybrid", "stream")
QWEN2_1_5B = ModelShape(
    hidden_size=1536,
    layers=28,
    heads=12,
    kv_heads=2,
    vocabulary=151936,
    intermediate_size=8960,
    sequence_length=2048,
    bytes_per_weight=4,
    tied=True,
)
EMBEDDING = 151936 * 1536
LAYER = 2 * 1536 * 1536 + 2 * 256 * 1536 + 3 * 1536 * 8960 + 2 * 1536
CACHE = 2048 * 28 * 2 * 256 * 2


def in_blocks(*weights: int) -> int:
    """What so many of float32 take on a GPU, each number with a large allocation of its own."""
    return sum(-(-4 * count // (2 << 20)) * (2 << 20) for count in weights)


RESIDENT = in_blocks(*2 * [1536 * 1536], *2 * [256 * 1536], *3 * [1536 * 8960]) + 4 * 2 * 1536  # a layer that stays


class TestQwen2:
    """A real model's shape in float32, at the sizes of real devices."""

    def test_estimates(self) -> None:
        full, streaming = estimate_full(QWEN2_1_5B), estimate_streaming(QWEN2_1_5B)
        assert 5_500_000_000 < full < 7_000_000_000
        assert estimate_layer(QWEN2_1_5B) == 4 * LAYER
        assert 150_000_000 < 4 * LAYER < 250_000_000
        assert streaming < full / 2
        assert full - streaming == 28 * RESIDENT - 2 * in_blocks(LAYER)

    def test_all_of_it_fits_12_gb(self) -> None:
        plan = plan_memory(QWEN2_1_5B, free=12_000_000_000)
        assert (plan.mode, len(plan.resident), plan.streamed) == ("full", 28, ())
        assert (plan.slots, plan.slot_nbytes, plan.breakdown["slots"], plan.sweep_nbytes) == (0, 0, 0, 0)
        assert plan.total == estimate_full(QWEN2_1_5B)

    def test_two_layers_stay_in_2_gib(self) -> None:
        plan = plan_memory(QWEN2_1_5B, free=2 << 30)
        assert (plan.mode, plan.resident) == ("hybrid", (7, 21))
        assert plan.breakdown["weights"] == in_blocks(EMBEDDING) + 4 * 1536 + 2 * RESIDENT
        assert (plan.slots, plan.slot_nbytes, plan.breakdown["slots"]) == (2, 4 * LAYER, 2 * in_blocks(LAYER))
        assert plan.breakdown["kv_cache"] == CACHE
        assert plan.sweep_nbytes == 26 * 4 * LAYER

    def test_none_stays_where_that_is_not_allowed(self) -> None:
        plan = plan_memory(QWEN2_1_5B, free=2 << 30, allow=("full", "stream"))
        assert (plan.mode, plan.resident, len(plan.streamed)) == ("stream", (), 28)
        assert plan.total == estimate_streaming(QWEN2_1_5B)

    def test_512_mb_do_not_do(self) -> None:
        with pytest.raises(DoesNotFitError) as caught:
            plan_memory(QWEN2_1_5B, free=512_000_000)
        error = caught.value
        assert isinstance(error, MemoryError)
        assert isinstance(error, PlanError)
        assert error.needed == sum(error.breakdown.values()) == estimate_streaming(QWEN2_1_5B)
        assert error.available == 460_800_000

    def test_a_head_of_its_own_counts(self) -> None:
        untied = replace(QWEN2_1_5B, tied=False)
        assert estimate_full(untied) - estimate_full(QWEN2_1_5B) == in_blocks(EMBEDDING)

    def test_host_memory_is_not_taken_in_blocks(self) -> None:
        plan = plan_memory(QWEN2_1_5B, free=12_000_000_000, device="host")
        assert plan.breakdown["weights"] == 4 * (EMBEDDING + 1536 + 28 * LAYER)

    def test_the_cache_for_prefill(self) -> None:
        matrices = LAYER - 2 * 1536
        rows = 2 * 1536 + 2 * 256 + 2 * 8960 + 1536
        assert estimate_prefill_cache(QWEN2_1_5B, "fp16") == 28 * 2 * matrices
        assert estimate_prefill_cache(QWEN2_1_5B, "fp8") == 28 * (matrices + 4 * rows)

    def test_the_workspace(self) -> None:
        results = 2 * 1536 + 2 * 256 + 2 * 8960 + 1536
        values = 512 * (2 * 1536 + 2 * results + 2048) + 151936
        assert workspace_nbytes(QWEN2_1_5B, context=2048, batch=512) == 4 * values + (32 << 20)

    @pytest.mark.parametrize("field", ["hidden_size", "layers", "kv_heads", "bytes_per_weight", "sequence_length"])
    @pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
    def test_sizes_that_cannot_be(self, field: str, value: Any) -> None:
        with pytest.raises(OptionsError) as caught:
            replace(QWEN2_1_5B, **{field: value})
        assert caught.value.option == field

    def test_a_shape_has_no_dtype(self) -> None:
        with pytest.raises(OptionsError):
            plan_memory(QWEN2_1_5B, free=1 << 40, dtype="bf16")


NOTHING: Mapping[str, Any] = {}
METADATA: Mapping[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 4,
    "llama.context_length": 131072,
    "llama.embedding_length": 256,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
}


class Model:
    """Headers with one Q8_0 matrix and one F32 norm a layer; rows by layer, or the same for all."""

    def __init__(self, make_header: MakeHeader) -> None:
        self._make = make_header

    def __call__(
        self, rows: Sequence[int] = (64, 64, 64, 64), *, tied: bool = True, metadata: Mapping[str, Any] = NOTHING
    ) -> Header:
        tensors: dict[str, tuple[GGMLType, tuple[int, ...]]] = {
            "token_embd.weight": (GGMLType.Q4_K, (1000, 256)),
            "output_norm.weight": (GGMLType.F32, (256,)),
        }
        if not tied:
            tensors["output.weight"] = GGMLType.Q6_K, (1000, 256)
        for layer, count in enumerate(rows):
            tensors[f"blk.{layer}.attn_norm.weight"] = GGMLType.F32, (200,)
            tensors[f"blk.{layer}.ffn_up.weight"] = GGMLType.Q8_0, (count, 256)
        known = {f"llama.{key}": value for key, value in metadata.items()}
        return self._make(tensors, {**METADATA, "llama.block_count": len(rows), **known})


@pytest.fixture(scope="session")
def model(make_header: MakeHeader) -> Model:
    return Model(make_header)


def align(nbytes: int) -> int:
    return -(-nbytes // 256) * 256


def total_of(model: Header, **more: Any) -> int:
    """What a plan takes when there is no lack of memory."""
    return plan_memory(model, free=1 << 40, **more).total


def free_for(total: int) -> int:
    """The least free bytes of which a tenth is left."""
    free = total * 10 // 9
    while free - -(-free // 10) < total:
        free += 1
    return free


class TestHeader:
    def test_what_an_h200_took_for_the_tensors_of_a_large_model(self, make_header: MakeHeader) -> None:
        """Llama of 8 billion weights, Q8_0, with a vocabulary of 1,024: 7.665 GB by cuMemGetInfo (driver 580)."""
        matrices = {"q": 4096, "k": 1024, "v": 1024, "output": 4096, "gate": 14336, "up": 14336, "down": 14336}
        names = {"token_embd.weight": 1024, "output.weight": 1024}
        names |= {f"blk.{layer}.{name}.weight": rows for layer in range(32) for name, rows in matrices.items()}
        tensors: dict[str, tuple[GGMLType, tuple[int, ...]]] = {
            name: (GGMLType.Q8_0, (rows, 4096)) for name, rows in names.items()
        }
        norms = ["output_norm", *(f"blk.{layer}.{name}_norm" for layer in range(32) for name in ("attn", "ffn"))]
        tensors |= {f"{name}.weight": (GGMLType.F32, (4096,)) for name in norms}
        plan = plan_memory(make_header(tensors, {}), free=1 << 40, kv_bytes=0)
        assert sum(tensor.nbytes for tensor in plan.load.tensors) == 7_425_507_328
        assert plan.breakdown["weights"] == pytest.approx(7.665e9, abs=2 << 20)

    def test_a_layer_lies_aligned_in_its_slot(self, model: Model) -> None:
        layer = plan_memory(model(), free=1 << 40).layers[2]
        assert layer.offsets == (0, 1024)
        assert [tensor.info.name for tensor in layer.load.tensors] == ["blk.2.attn_norm.weight", "blk.2.ffn_up.weight"]
        assert layer.nbytes == 1024 + align(64 * 256 // 32 * 34)
        assert layer.upload_nbytes == 800 + 64 * 256 // 32 * 34
        assert layer.nbytes == estimate_layer(model())

    def test_it_stands_on_the_load_plan(self, model: Model) -> None:
        options = Options(chunk_size=8 << 20, engine="python", streams=3)
        plan = plan_memory(model(tied=False), free=1 << 40, dtype="bf16", options=options)
        assert plan.load == plan_load(model(tied=False), dtype="bf16", device="cuda", chunk_size=8 << 20)
        assert plan.breakdown["weights"] == sum(align(tensor.nbytes) for tensor in plan.load.tensors)
        assert plan.breakdown["scratch"] == 3 * (8 << 20)

    def test_tensors_are_placed(self, model: Model) -> None:
        plan = plan_memory(model(), free=1 << 40, allow=["hybrid"])
        assert plan.resident == (0, 2, 3)
        places = {tensor.info.name: place for tensor, place in plan.tensors}
        assert places["token_embd.weight"] is Placement.ALWAYS
        assert places["blk.0.ffn_up.weight"] is Placement.RESIDENT
        assert places["blk.1.attn_norm.weight"] is Placement.STREAMED
        assert list(places) == list(model().tensors)
        once = [tensor.info.name for tensor in plan.load.tensors]
        assert once == [name for name, place in places.items() if place is not Placement.STREAMED]
        assert plan.load.upload_nbytes + plan.sweep_nbytes == model().nbytes

    def test_a_slot_holds_the_largest_layer_that_streams(self, model: Model) -> None:
        header = model([64, 512, 64, 128])
        assert plan_memory(header, free=1 << 40, allow=["stream"]).slot_nbytes == 1024 + 512 * 256 // 32 * 34
        plan = plan_memory(header, free=1 << 40, allow=["hybrid"])
        assert plan.streamed == (1,)
        assert plan.slot_nbytes == plan.layers[1].nbytes

    def test_purposes_are_those_of_the_ledger(self, model: Model) -> None:
        purposes = set(Purpose) - {Purpose.UNKNOWN}
        assert set(plan_memory(model(), free=1 << 40).breakdown) == {str(purpose) for purpose in purposes}

    def test_packed_bytes_cross_the_bus_and_decoded_ones_fill_the_slot(self, model: Model) -> None:
        by_device = plan_memory(model(), free=1 << 40, allow=["stream"], dtype="bf16")
        by_host = plan_memory(model(), free=1 << 40, allow=["stream"], dtype="bf16", options=Options(decode="host"))
        packed, decoded = 800 + 64 * 256 // 32 * 34, 2 * 200 + 2 * 64 * 256
        assert by_device.slot_nbytes == by_host.slot_nbytes == align(400) + 2 * 64 * 256
        assert (by_device.sweep_nbytes, by_host.sweep_nbytes) == (4 * packed, 4 * decoded)
        assert by_host.breakdown["scratch"] == 0
        assert {tensor.decode for tensor in by_host.layers[0].load.tensors} == {Decode.HOST}

    def test_the_context_is_the_models_own_within_reason(self, model: Model) -> None:
        assert plan_memory(model(), free=1 << 40).context == 4096
        assert plan_memory(model(metadata={"context_length": 512}), free=1 << 40).context == 512
        for absurd in (-1, 0, "long", True, 1 << 63):
            assert plan_memory(model(metadata={"context_length": absurd}), free=1 << 40).context == 4096
        assert plan_memory(model(metadata={"context_length": 512}), free=1 << 40, context=100_000).context == 100_000

    def test_the_cache_can_be_set(self, model: Model) -> None:
        plan = plan_memory(model(metadata={"ssm.conv_kernel": "?"}), free=1 << 40, kv_bytes=12345)
        assert (plan.breakdown["kv_cache"], plan.kv_exact) == (12345, True)

    def test_a_bound_of_the_cache_is_marked(self, model: Model) -> None:
        assert plan_memory(model(), free=1 << 40).kv_exact
        assert not plan_memory(model(metadata={"attention.kv_lora_rank": 64}), free=1 << 40).kv_exact

    def test_the_workspace_can_be_set(self, model: Model) -> None:
        assert plan_memory(model(), free=1 << 40, workspace=777).breakdown["workspace"] == 777

    def test_only_the_experts_that_a_token_uses_compute(self, make_header: MakeHeader) -> None:
        tensors = {
            "blk.0.ffn_up_exps.weight": (GGMLType.F16, (8, 64, 32)),
            "blk.0.ffn_up.weight": (GGMLType.F16, (5, 32)),
        }

        def results(used: object) -> int:
            header = make_header(tensors, {"general.architecture": "moe", "moe.expert_used_count": used})
            return (workspace_nbytes(header, context=1, batch=1) - (32 << 20) - 4) // 8  # less the mask

        assert results(2) == 2 * 64 + 5
        for absurd in (None, 0, -1, 9, "two", 1.5):
            assert results(absurd) == 8 * 64 + 5

    def test_copies_for_prefill_are_of_layers_that_stay(self, model: Model) -> None:
        header = model()
        every = estimate_prefill_cache(header, "fp16")
        assert every == 4 * 2 * 64 * 256
        full = plan_memory(header, free=1 << 40, prefill_cache="fp16")
        half = plan_memory(header, free=1 << 40, prefill_cache="fp16", allow=["hybrid"])
        none = plan_memory(header, free=1 << 40, prefill_cache="fp16", allow=["stream"])
        assert [plan.prefill_nbytes for plan in (full, half, none)] == [every, every * 3 // 4, 0]
        without = plan_memory(header, free=1 << 40)
        assert full.breakdown["weights"] - without.breakdown["weights"] == every

    def test_what_has_two_bytes_a_weight_needs_no_fp16_copy(self, model: Model) -> None:
        assert estimate_prefill_cache(model(), "fp16", dtype="bf16") == 0
        assert estimate_prefill_cache(model(), "fp8", dtype="bf16") == 4 * (64 * 256 + 4 * 64)

    def test_staging_is_shown_and_not_counted(self, model: Model) -> None:
        plan = plan_memory(model(), free=1 << 40, options=Options(staging=100 << 20))
        assert plan.staging == 100 << 20
        assert plan.total == plan_memory(model(), free=1 << 40).total

    def test_what_cannot_be_decoded_is_refused(self, make_header: MakeHeader) -> None:
        header = make_header({"blk.0.a.weight": (GGMLType.Q8_K, (1, 256))}, METADATA)
        with pytest.raises(UnsupportedQuantError):
            plan_memory(header, free=1 << 40, dtype="bf16")

    @pytest.mark.parametrize(
        "option",
        [
            {"context": 0},
            {"context": 1 << 60},
            {"kv_type": "f12"},
            {"kv_bytes": -1},
            {"prefill_cache": "fp4"},
            {"batch": 0},
            {"workspace": -1},
            {"slots": 0},
            {"allow": ()},
            {"allow": "stream"},
            {"margin": 1.0},
            {"margin": -0.1},
            {"free": -1},
            {"dtype": "f12"},
        ],
        ids=str,
    )
    def test_options_that_cannot_be(self, model: Model, option: dict[str, Any]) -> None:
        arguments: dict[str, Any] = {"free": 1 << 40, **option}
        with pytest.raises(OptionsError) as caught:
            plan_memory(model(), **arguments)
        assert caught.value.option == next(iter(option))


class TestModes:
    def test_a_model_without_layers_is_full_or_refused(self, make_header: MakeHeader) -> None:
        header = make_header({"a.weight": (GGMLType.F32, (64, 64))}, {})
        assert plan_memory(header, free=1 << 40).mode == "full"
        with pytest.raises(PlanError, match="0 layers"):
            plan_memory(header, free=1 << 40, allow=["stream", "hybrid"])

    def test_one_layer_is_no_hybrid(self, model: Model) -> None:
        with pytest.raises(PlanError, match="1 layers"):
            plan_memory(model([64]), free=1 << 40, allow=["hybrid"])

    def test_absurdly_many_layers_do_not_stream(self, make_header: MakeHeader) -> None:
        header = make_header({f"blk.{layer}.a.weight": (GGMLType.I8, (0,)) for layer in range(3000)}, {})
        assert plan_memory(header, free=1 << 40, kv_bytes=0).mode == "full"
        with pytest.raises(PlanError, match="3000 layers"):
            plan_memory(header, free=1 << 40, kv_bytes=0, allow=["hybrid", "stream"])

    def test_the_margin_is_left_alone(self, model: Model) -> None:
        total = total_of(model())
        assert plan_memory(model(), free=total, margin=0).mode == "full"
        with pytest.raises(DoesNotFitError):
            plan_memory(model(), free=total - 1, margin=0, allow=["full"])
        plan = plan_memory(model(), free=1000 << 20)
        assert (plan.margin, plan.available) == (100 << 20, 900 << 20)


class TestDoesNotFit:
    def test_what_fits_is_suggested_first_and_does_fit(self, model: Model) -> None:
        header = model([512] * 8)
        request: dict[str, Any] = {
            "context": 100_000,
            "dtype": "f32",
            "prefill_cache": "fp8",
            "slots": 6,
            "allow": ("full",),
        }
        free = free_for(total_of(header, **request | {"allow": ("stream",), "slots": 6}))
        with pytest.raises(DoesNotFitError) as caught:
            plan_memory(header, free=free, **request)
        suggestions = caught.value.suggestions
        assert [suggestion.fits for suggestion in suggestions] == sorted((s.fits for s in suggestions), reverse=True)
        assert {"allow", "context", "dtype", "kv_type", "prefill_cache"} <= {s.option for s in suggestions}
        assert str(caught.value).startswith(f"{caught.value.message}; what helps: ")
        assert "what helps" not in caught.value.message
        for suggestion in suggestions:
            assert suggestion.needed < caught.value.needed
            assert str(suggestion) in str(caught.value)
            changed: dict[str, Any] = {**request, suggestion.option: suggestion.value}
            if suggestion.fits:
                assert plan_memory(header, free=free, **changed).total <= free * 9 // 10
            else:
                with pytest.raises(DoesNotFitError) as again:
                    plan_memory(header, free=free, **changed)
                assert again.value.needed == suggestion.needed

    def test_the_longest_context_that_fits(self, model: Model) -> None:
        header = model()
        free = free_for(total_of(header, context=10 * 256, allow=["stream"])) + 5
        with pytest.raises(DoesNotFitError) as caught:
            plan_memory(header, free=free, context=50_000, allow=["stream"])
        best = next(suggestion for suggestion in caught.value.suggestions if suggestion.option == "context")
        assert (best.value, best.fits) == (10 * 256, True)

    def test_fewer_slots(self, model: Model) -> None:
        header = model([64, 4096])
        free = free_for(total_of(header, slots=1, allow=["stream"]))
        with pytest.raises(DoesNotFitError) as caught:
            plan_memory(header, free=free, slots=3, allow=["stream"])
        assert [s for s in caught.value.suggestions if s.option == "slots" and s.value == 1 and s.fits]

    def test_a_bound_says_that_it_can_be_set(self, model: Model) -> None:
        for metadata, exact in (({"attention.kv_lora_rank": 64}, False), (NOTHING, True)):
            with pytest.raises(DoesNotFitError) as caught:
                plan_memory(model(metadata=metadata), free=1)
            assert caught.value.kv_exact == exact
            assert ("kv_bytes=..." in str(caught.value)) != exact

    def test_the_message_is_one_line_with_the_figures(self, model: Model) -> None:
        with pytest.raises(DoesNotFitError) as caught:
            plan_memory(model(), free=20_000_000)
        text = str(caught.value)
        assert "\n" not in text
        assert "17.2 MiB available of 19.1 MiB free" in text
        assert "what helps: " in text


class TestSpread:
    @given(layers=st.integers(1, 200), data=st.data())
    def test_any_run_of_layers_holds_as_many_as_any_other(self, layers: int, data: st.DataObject) -> None:
        resident = data.draw(st.integers(0, layers))
        positions = spread(layers, resident)
        assert list(positions) == sorted(set(positions))
        assert len(positions) == resident
        assert all(0 <= position < layers for position in positions)
        run = data.draw(st.integers(1, layers))
        marks = [layer in set(positions) for layer in range(layers)] * 2  # a sweep follows upon another
        counts = {sum(marks[begin : begin + run]) for begin in range(layers)}
        assert max(counts) - min(counts) <= 1

    def test_residents_lie_in_the_middle_of_what_streams(self) -> None:
        assert spread(28, 2) == (7, 21)
        assert spread(9, 3) == (1, 4, 7)
        assert spread(5, 5) == (0, 1, 2, 3, 4)
        assert spread(4, 0) == ()


ROWS = st.lists(st.sampled_from([32, 64, 96, 512]), min_size=2, max_size=12)
ALLOW = st.lists(st.sampled_from(MODES), min_size=1, unique=True)


def plan_or_none(header: Header, **more: Any) -> Plan | None:
    try:
        return plan_memory(header, **more)
    except DoesNotFitError:
        return None


class TestAnyModel:
    @given(rows=ROWS, share=st.floats(0.3, 1.3), slots=st.integers(1, 4), dtype=st.sampled_from(["packed", "bf16"]))
    def test_the_most_layers_that_fit_stay(
        self, model: Model, rows: list[int], share: float, slots: int, dtype: str
    ) -> None:
        header = model(rows)
        settings: dict[str, Any] = {"slots": slots, "dtype": dtype, "workspace": 1000, "kv_bytes": 1000}
        settings["options"] = Options(chunk_size=64 << 10)
        free = int(total_of(header, **settings) * share)
        plan = plan_or_none(header, free=free, **settings)
        assume(plan is not None)
        assert plan is not None
        assert sum(plan.breakdown.values()) == plan.total <= plan.available == free - plan.margin
        assert plan.margin * 10 >= free
        assert set(plan.resident) | set(plan.streamed) == set(range(len(rows)))
        assert len(plan.resident) + len(plan.streamed) == len(rows)
        sizes = {number: layer.nbytes for number, layer in plan.layers.items()}
        rest = plan.total - plan.breakdown["slots"] - sum(sizes[number] for number in plan.resident)
        for count in range(len(plan.resident) + 1, len(rows)):
            kept = spread(len(rows), count)
            slot = max(size for number, size in sizes.items() if number not in kept)
            assert rest + slots * slot + sum(sizes[number] for number in kept) > plan.available
        if plan.mode != "full":
            assert rest + sum(sizes.values()) > plan.available
            assert plan.breakdown["slots"] == slots * max(sizes[number] for number in plan.streamed)

    @given(rows=ROWS, free=st.integers(0, 3_000_000), more=st.integers(0, 1_000_000), allow=ALLOW)
    def test_more_memory_never_means_less(
        self, model: Model, rows: list[int], free: int, more: int, allow: list[Mode]
    ) -> None:
        header = model(rows)
        settings: dict[str, Any] = {"workspace": 0, "kv_bytes": 0, "allow": allow}
        first = plan_or_none(header, free=free, **settings)
        second = plan_or_none(header, free=free + more, **settings)
        if first is not None:
            assert second is not None
            assert MODES.index(second.mode) <= MODES.index(first.mode)
            assert len(second.resident) >= len(first.resident)
            assert second.sweep_nbytes <= first.sweep_nbytes or len(set(rows)) > 1

    @given(rows=ROWS, allow=ALLOW)
    def test_what_is_needed_is_enough(self, model: Model, rows: list[int], allow: list[Mode]) -> None:
        header = model(rows)
        with pytest.raises(DoesNotFitError) as caught:
            plan_memory(header, free=0, allow=allow)
        needed = caught.value.needed
        assert plan_memory(header, free=needed, margin=0, allow=allow).total == needed
        assert plan_or_none(header, free=needed - 1, margin=0, allow=allow) is None
