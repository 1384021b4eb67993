from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncload.errors import (
    OptionsError,
    PlanError,
    RangeError,
    TargetError,
    TensorNotFoundError,
    UnsupportedQuantError,
)
from asyncload.gguf import GGMLType, TensorInfo
from asyncload.options import DecodeOption, DeviceKind
from asyncload.plan import Decode, LoadPlan, TensorPlan, plan_load, select_tensors
from asyncload.quant import DType

CHUNK = 64 << 10


class FakeHeader:
    """As much of a header as planning looks at."""

    def __init__(self, *tensors: tuple[str, GGMLType, tuple[int, ...]], gap: int = 0) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        offset = 1024
        for name, kind, shape in tensors:
            weights = 1
            for length in shape:
                weights *= length
            nbytes = weights // kind.block_size * kind.type_size
            self.tensors[name] = TensorInfo(name, kind, shape, offset, nbytes, 0)
            offset += -(-nbytes // 32) * 32 + gap
        self.layers: dict[int, tuple[TensorInfo, ...]] = {}
        for info in self.tensors.values():
            if info.layer is not None:
                self.layers[info.layer] = (*self.layers.get(info.layer, ()), info)


HEADER: Any = FakeHeader(
    ("token_embd.weight", GGMLType.Q8_0, (100, 64)),
    ("blk.0.attn_q.weight", GGMLType.Q4_K, (8, 256)),
    ("blk.0.norm.weight", GGMLType.F32, (256,)),
    ("blk.1.attn_q.weight", GGMLType.Q8_K, (8, 256)),
    ("blk.1.norm.weight", GGMLType.F32, (256,)),
    ("ids", GGMLType.I32, (3,)),
)


def names(selection: Any) -> list[str]:
    return [info.name for info in select_tensors(HEADER, selection)]


class TestSelection:
    def test_none_is_everything(self) -> None:
        assert names(None) == list(HEADER.tensors)

    def test_names_globs_and_layers_each_once_in_file_order(self) -> None:
        assert names("ids") == ["ids"]
        assert names("blk.*.norm.weight") == ["blk.0.norm.weight", "blk.1.norm.weight"]
        assert names(1) == ["blk.1.attn_q.weight", "blk.1.norm.weight"]
        assert names(["ids", 0, "blk.0.*", "token_embd.weight"]) == [
            "token_embd.weight",
            "blk.0.attn_q.weight",
            "blk.0.norm.weight",
            "ids",
        ]
        assert names([]) == []

    @pytest.mark.parametrize("selection", ["nothing", "blk.?.nothing", 2, -1, ["ids", "nothing"]])
    def test_what_selects_nothing_is_an_error(self, selection: Any) -> None:
        with pytest.raises(TensorNotFoundError) as caught:
            names(selection)
        assert isinstance(caught.value, KeyError)
        assert str(caught.value).startswith(("no tensor", "there is no layer"))


class TestDtype:
    def dtypes(self, spec: Any, selection: Any = None) -> dict[str, tuple[DType, bool, tuple[int, ...]]]:
        plan = plan_load(HEADER, dtype=spec, select=selection)
        return {
            tensor.info.name: (tensor.dtype, tensor.decode is not Decode.NONE, tensor.shape) for tensor in plan.tensors
        }

    def test_packed_leaves_every_type_as_it_is(self) -> None:
        assert self.dtypes("packed") == {
            "token_embd.weight": (DType.UINT8, False, (100, 68)),
            "blk.0.attn_q.weight": (DType.UINT8, False, (8, 144)),
            "blk.0.norm.weight": (DType.FLOAT32, False, (256,)),
            "blk.1.attn_q.weight": (DType.UINT8, False, (8, 292)),
            "blk.1.norm.weight": (DType.FLOAT32, False, (256,)),
            "ids": (DType.INT32, False, (3,)),
        }

    def test_a_dtype_decodes_floats_and_keeps_integers(self) -> None:
        dtypes = self.dtypes("bf16", [0, "token_embd.weight", "ids"])
        assert dtypes == {
            "token_embd.weight": (DType.BFLOAT16, True, (100, 64)),
            "blk.0.attn_q.weight": (DType.BFLOAT16, True, (8, 256)),
            "blk.0.norm.weight": (DType.BFLOAT16, True, (256,)),
            "ids": (DType.INT32, False, (3,)),
        }

    def test_a_tensor_that_has_the_dtype_already_is_not_decoded(self) -> None:
        assert self.dtypes("float32", "blk.0.norm.weight")["blk.0.norm.weight"] == (DType.FLOAT32, False, (256,))

    def test_a_mapping_decides_by_pattern_and_the_first_match_counts(self) -> None:
        dtypes = self.dtypes({"blk.0.attn_q.weight": "f16", "blk.0.*": "float32"})
        assert dtypes["blk.0.attn_q.weight"][0] is DType.FLOAT16
        assert dtypes["blk.0.norm.weight"][0] is DType.FLOAT32
        assert dtypes["token_embd.weight"][0] is DType.UINT8

    def test_what_cannot_be_decoded_is_refused_by_name(self) -> None:
        with pytest.raises(UnsupportedQuantError, match=r"blk\.1\.attn_q\.weight: Q8_K") as caught:
            plan_load(HEADER, dtype="bf16")
        assert (caught.value.tensor, caught.value.type, caught.value.dtype) == (
            "blk.1.attn_q.weight",
            "Q8_K",
            "bfloat16",
        )

    def test_unknown_dtypes_and_patterns_are_refused(self) -> None:
        for spec in ("float128", "int8", "uint8"):
            with pytest.raises(OptionsError):
                plan_load(HEADER, dtype=spec)
        with pytest.raises(TensorNotFoundError):
            plan_load(HEADER, dtype={"nothing*": "bf16"})


class TestRanges:
    def test_a_tensor_outside_its_file_is_refused(self) -> None:
        plan = plan_load(HEADER)
        end = max(tensor.info.offset + tensor.info.nbytes for tensor in plan.tensors)
        plan.check_sources([end])
        with pytest.raises(RangeError) as caught:
            plan.check_sources([end - 1])
        assert caught.value.limit == end - 1

    def test_a_block_that_fits_no_chunk_is_refused(self) -> None:
        with pytest.raises(PlanError, match="one block"):
            list(plan_load(HEADER, dtype="f32", select="blk.0.attn_q.weight", chunk_size=1024).chunks())


class TestDecode:
    """Where tensors are decoded, by the option, the device's kind, and the target's alignment."""

    def places(self, decode: DecodeOption, device: DeviceKind, **more: Any) -> dict[str, str]:
        plan = plan_load(HEADER, dtype="bf16", select=0, decode=decode, device=device, **more)
        return {tensor.info.name: str(tensor.decode) for tensor in plan.tensors}

    @pytest.mark.parametrize(
        ("decode", "device", "place"),
        [
            ("auto", "cuda", "device"),
            ("auto", "host", "host"),
            ("device", "cuda", "device"),
            ("device", "host", "device"),
            ("host", "cuda", "host"),
            ("host", "host", "host"),
        ],
    )
    def test_the_option_and_the_device_decide(self, decode: DecodeOption, device: DeviceKind, place: str) -> None:
        assert set(self.places(decode, device).values()) == {place}

    def test_what_stays_as_it_is_is_decoded_nowhere(self) -> None:
        plan = plan_load(HEADER, dtype={"blk.0.attn_q.weight": "bf16"}, decode="device", device="cuda")
        assert {tensor.info.name for tensor in plan.tensors if tensor.decode is not Decode.NONE} == {
            "blk.0.attn_q.weight"
        }

    def test_a_target_that_kernels_cannot_store_to_is_decoded_before(self) -> None:
        places = self.places("auto", "cuda", unaligned=["blk.0.attn_q.weight"])
        assert places == {"blk.0.attn_q.weight": "host", "blk.0.norm.weight": "device"}
        with pytest.raises(TargetError) as caught:
            self.places("device", "cuda", unaligned=["blk.0.attn_q.weight"])
        assert caught.value.tensor == "blk.0.attn_q.weight"

    def test_what_crosses_the_bus_is_what_is_decoded_behind_it(self) -> None:
        packed, decoded = 8 * 144 + 1024, (8 * 256 + 256) * 2
        behind = plan_load(HEADER, dtype="bf16", select=0, decode="device")
        before = plan_load(HEADER, dtype="bf16", select=0, decode="host")
        assert (behind.upload_nbytes, behind.device_nbytes) == (packed, decoded)
        assert (before.upload_nbytes, before.device_nbytes) == (decoded, decoded)

    def test_the_kernels_that_a_plan_needs(self) -> None:
        plan = plan_load(HEADER, dtype="f16", select=0, decode="device")
        assert plan.kernels(Decode.DEVICE) == {(GGMLType.Q4_K, DType.FLOAT16), (GGMLType.F32, DType.FLOAT16)}
        assert plan.kernels(Decode.HOST) == set()


def check_chunks(plan: LoadPlan, chunk_size: int, skip: set[int] | None = None) -> None:
    """Every byte of every tensor in exactly one segment, nothing outside its buffer, nothing twice in a buffer."""
    skip = skip or set()
    source_next = [tensor.info.offset for tensor in plan.tensors]
    target_next = [0] * len(plan.tensors)
    seen: set[int] = set()
    group = -1
    for chunk in plan.chunks(skip):
        assert chunk.group in {group, group + 1}
        if chunk.group == group + 1:
            assert all(target_next[index] == plan.tensors[index].nbytes for index in seen), "a group was left open"
        group = chunk.group
        used = [(0, chunk.nbytes)]
        assert chunk.segments
        for segment in chunk.segments:
            tensor = plan.tensors[segment.tensor]
            seen.add(segment.tensor)
            assert chunk.part == tensor.info.part
            assert chunk.offset + segment.source_offset == source_next[segment.tensor]
            assert segment.source_offset + segment.source_nbytes <= chunk.nbytes
            assert segment.target_offset == target_next[segment.tensor]
            if tensor.decode is Decode.NONE:
                assert segment.target_nbytes == segment.source_nbytes
            else:
                assert segment.source_nbytes % tensor.info.type.type_size == 0
                blocks = segment.source_nbytes // tensor.info.type.type_size
                assert segment.target_nbytes == blocks * tensor.block_nbytes
            if tensor.decode is Decode.HOST:
                assert segment.upload_offset % 64 == 0
                assert segment.upload_nbytes == segment.target_nbytes
                used.append((segment.upload_offset, segment.upload_offset + segment.upload_nbytes))
            else:
                assert (segment.upload_offset, segment.upload_nbytes) == (segment.source_offset, segment.source_nbytes)
            if tensor.decode is Decode.DEVICE:
                assert segment.target_offset % 16 == 0
            source_next[segment.tensor] += segment.source_nbytes
            target_next[segment.tensor] += segment.target_nbytes
        ranges = sorted(item for item in used if item[0] != item[1])
        assert all(left[1] <= right[0] for left, right in pairwise(ranges)), "ranges overlap"
        assert all(end <= chunk_size for _, end in ranges)
    assert seen == set(range(len(plan.tensors))) - skip
    for index in seen:
        tensor = plan.tensors[index]
        assert source_next[index] == tensor.info.offset + tensor.info.nbytes
        assert target_next[index] == tensor.nbytes


class TestChunks:
    @pytest.mark.parametrize("size", [0, 1, CHUNK // 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK - 1, 3 * CHUNK])
    def test_sizes_at_the_boundary(self, size: int) -> None:
        header: Any = FakeHeader(("a", GGMLType.I8, (size,)), ("b", GGMLType.I8, (5,)))
        plan = plan_load(header, chunk_size=CHUNK)
        check_chunks(plan, CHUNK)
        if size > CHUNK // 2:
            assert len([c for c in plan.chunks() if c.segments[0].tensor == 0]) == -(-size // CHUNK)

    def test_small_tensors_share_a_read(self) -> None:
        header: Any = FakeHeader(*((f"t{i}", GGMLType.F32, (16,)) for i in range(100)))
        assert len(list(plan_load(header, chunk_size=CHUNK).chunks())) == 1

    def test_thousands_of_small_tensors_come_in_pieces(self) -> None:
        header: Any = FakeHeader(*((f"t{i}", GGMLType.F32, (1,)) for i in range(3000)))
        plan = plan_load(header)
        check_chunks(plan, plan.chunk_size)
        assert max(len(chunk.segments) for chunk in plan.chunks()) <= 256

    def test_small_tensors_far_apart_do_not(self) -> None:
        header: Any = FakeHeader(*((f"t{i}", GGMLType.F32, (16,)) for i in range(3)), gap=1 << 20)
        assert len(list(plan_load(header, chunk_size=CHUNK).chunks())) == 3

    @given(
        seed=st.integers(0, 2**32),
        dtype=st.sampled_from(["packed", "f32", "f16", "bf16"]),
        chunk=st.sampled_from([CHUNK, 4 * CHUNK]),
        decode=st.sampled_from(["auto", "device", "host"]),
        device=st.sampled_from(["cuda", "host"]),
    )
    def test_any_model_is_covered_exactly_once(
        self, seed: int, dtype: str, chunk: int, decode: DecodeOption, device: DeviceKind
    ) -> None:
        rng = random.Random(seed)
        kinds = [GGMLType.F32, GGMLType.F16, GGMLType.Q4_0, GGMLType.Q8_0, GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.I32]
        tensors: list[TensorPlan] = []
        header: Any = FakeHeader(
            *(
                (f"t{i}", kind, (rng.choice([0, 1, 3, 17, 200]), kind.block_size * rng.choice([1, 2, 9])))
                for i in range(rng.randrange(30))
                for kind in [rng.choice(kinds)]
            ),
            gap=rng.choice([0, 0, 100, 1 << 17]),
        )
        plan = plan_load(header, dtype=dtype, chunk_size=chunk, decode=decode, device=device)
        check_chunks(plan, chunk)
        assert sum(chunk.upload_nbytes for chunk in plan.chunks()) == plan.upload_nbytes
        assert sum(chunk.target_nbytes for chunk in plan.chunks()) == plan.device_nbytes
        tensors.extend(plan.tensors)
        check_chunks(plan, chunk, skip={index for index in range(len(tensors)) if rng.random() < 0.3})
