"""The same plan, the same chunks: C++ cuts a load as Python does."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncload.errors import PlanError
from asyncload.gguf import GGMLType, TensorInfo
from asyncload.plan import Decode, LoadPlan, TensorPlan
from asyncload.quant import DType
from tests.native.jobs import job_table

pytestmark = pytest.mark.native

TYPES = [type_ for type_ in GGMLType if not type_.integer]
CHUNK_SIZES = [4096, 16 << 10, 64 << 10, 1 << 20]


@st.composite
def tensor_plans(draw: st.DrawFn) -> list[TensorPlan]:
    """Tensors in the order of their files, with gaps of any size between them, to be decoded anywhere."""
    plans: list[TensorPlan] = []
    offset, part = 4096, 0
    for index in range(draw(st.integers(0, 40))):
        if draw(st.integers(0, 15)) == 0:
            part, offset = part + 1, 4096
        type_ = draw(st.sampled_from(TYPES))
        decode = draw(st.sampled_from(list(Decode)))
        dtype = draw(st.sampled_from([DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16]))
        blocks = draw(st.one_of(st.integers(0, 4), st.integers(0, 400), st.integers(0, 20_000)))
        weights = blocks * type_.block_size
        nbytes = type_.nbytes(weights)
        info = TensorInfo(f"tensor {index}", type_, (weights,), offset, nbytes, part)
        after = nbytes if decode is Decode.NONE else weights * dtype.itemsize
        plans.append(TensorPlan(info, dtype, (weights,), decode, after))
        offset += nbytes + draw(st.sampled_from([0, 1, 31, 32, (64 << 10) - 1, 64 << 10, (64 << 10) + 1, 1 << 20]))
    return plans


def chunks_of(plan: LoadPlan, skipped: set[int]) -> Any:
    """Those of Python, as C++ tells its own."""
    return [
        (
            chunk.group,
            chunk.part,
            chunk.offset,
            chunk.nbytes,
            [
                (
                    each.tensor,
                    each.source_offset,
                    each.source_nbytes,
                    each.upload_offset,
                    each.upload_nbytes,
                    each.target_offset,
                    each.target_nbytes,
                )
                for each in chunk.segments
            ],
        )
        for chunk in plan.chunks(skipped)
    ]


@given(plans=tensor_plans(), chunk_size=st.sampled_from(CHUNK_SIZES), skipped=st.sets(st.integers(0, 40)))
def test_any_plan_is_cut_as_in_python(plans: list[TensorPlan], chunk_size: int, skipped: set[int]) -> None:
    from asyncload_native import cut

    plan = LoadPlan(tuple(plans), chunk_size)
    try:
        wanted = chunks_of(plan, skipped)
    except PlanError:
        with pytest.raises(ValueError, match="one block takes"):
            cut(job_table(plan, skipped), chunk_size)
    else:
        assert cut(job_table(plan, skipped), chunk_size) == wanted


@given(
    plans=tensor_plans(),
    chunk_size=st.sampled_from(CHUNK_SIZES),
    rising=st.integers(1, 30),
    skipped=st.sets(st.integers(0, 40)),
)
def test_chunks_that_rise_hold_the_same(
    plans: list[TensorPlan], chunk_size: int, rising: int, skipped: set[int]
) -> None:
    from asyncload_native import cut

    plan = LoadPlan(tuple(plans), chunk_size)
    try:
        expected = chunks_of(plan, skipped)
    except PlanError:
        with pytest.raises(ValueError, match="one block takes"):
            cut(job_table(plan, skipped), chunk_size, rising)
        return
    chunks = cut(job_table(plan, skipped), chunk_size, rising)
    assert segments_of(chunks) == segments_of(expected)
    assert all(at + nbytes <= chunk_size for *_, segments in chunks for *_, at, nbytes, _, _ in segments)


def segments_of(chunks: Any) -> list[tuple[int, ...]]:
    """Which bytes of which tensor come in which group from where, where neighbours are one."""
    joined: list[tuple[int, ...]] = []
    for group, part, offset, _, segments in chunks:
        for tensor, at, source, _, _, target_at, target in segments:
            here = (group, part, tensor, offset + at, source, target_at, target)
            if joined and joined[-1][:3] == here[:3]:
                *_, begin, length, target_begin, target_length = joined.pop()
                assert (begin + length, target_begin + target_length) == (offset + at, target_at)
                here = (group, part, tensor, begin, length + source, target_begin, target_length + target)
            joined.append(here)
    return joined


def test_the_first_chunks_rise_to_the_size_of_the_others() -> None:
    from asyncload_native import cut

    def sizes(nbytes: int) -> list[int]:
        info = TensorInfo("tensor", GGMLType.F32, (nbytes // 4,), 0, nbytes)
        plan = LoadPlan((TensorPlan(info, DType.FLOAT32, info.shape, Decode.NONE, nbytes),), 1 << 20)
        return [size >> 10 for *_, size, _ in cut(job_table(plan, set()), 1 << 20, 4)]

    assert sizes(4 << 20) == [256, 512, 768, 1024, 1024, 512]
    assert sizes(3 << 20) == [1024, 1024, 1024]  # not so many


@pytest.mark.parametrize("decode", list(Decode))
def test_so_many_small_tensors_that_they_do_not_share_one_chunk(decode: Decode) -> None:
    from asyncload_native import cut

    infos = [TensorInfo(str(index), GGMLType.F16, (8,), 32 * index, 16) for index in range(600)]
    nbytes = 16 if decode is Decode.NONE else 32
    plan = LoadPlan(tuple(TensorPlan(info, DType.FLOAT32, (8,), decode, nbytes) for info in infos), 1 << 20)
    chunks = cut(job_table(plan, set()), 1 << 20)
    assert chunks == chunks_of(plan, set())
    assert [len(segments) for *_, segments in chunks] == [256, 256, 88]


@given(plans=tensor_plans(), skipped=st.sets(st.integers(0, 40)))
def test_a_group_is_moved_once_all_of_its_tensors_are_admitted(plans: list[TensorPlan], skipped: set[int]) -> None:
    from asyncload_native import Job, Wake

    plan = LoadPlan(tuple(plans), 1 << 20)
    job = Job([], job_table(plan, skipped), 1 << 20, 3, Wake.END, to_host=False, timed=False, ahead=False)
    job.close()
    groups = [math.nan] * len(plans)
    for chunk in plan.chunks(skipped):
        for segment in chunk.segments:
            groups[segment.tensor] = chunk.group
    following: float = max((group for group in groups if not math.isnan(group)), default=-1) + 1
    for index in reversed(range(len(plans))):
        following = groups[index] = following if math.isnan(groups[index]) else groups[index]
    assert job.groups == groups
