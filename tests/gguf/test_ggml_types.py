"""The table of types is ggml's."""

from __future__ import annotations

import gguf
import pytest

from asyncload.gguf import GGMLType, ValueType
from asyncload.gguf._types import REMOVED_TYPES
from tests.gguf import ggml


@pytest.mark.parametrize("number", range(43))
def test_every_id_is_what_ggml_says(number: int) -> None:
    block_size, type_size = ggml.block_and_type_size(number)
    if number in REMOVED_TYPES:
        assert (block_size, type_size) == (0, 0)
        assert number not in set(GGMLType)
    else:
        assert (GGMLType(number).block_size, GGMLType(number).type_size) == (block_size, type_size)


def test_names_and_sizes_are_the_gguf_packages_but_for_q8_1() -> None:
    known = {int(theirs) for theirs in gguf.GGMLQuantizationType}
    assert set(GGMLType) - known <= {GGMLType.Q1_0, GGMLType.Q2_0}
    for member in (member for member in GGMLType if member in known):
        theirs = gguf.GGMLQuantizationType(member)
        assert member.name == theirs.name
        if member is not GGMLType.Q8_1:
            assert (member.block_size, member.type_size) == gguf.GGML_QUANT_SIZES[theirs]


def test_value_types_are_the_gguf_packages() -> None:
    assert {member.name: int(member) for member in ValueType} == {
        name: int(member) for name, member in gguf.GGUFValueType.__members__.items()
    }


def test_keys_are_the_gguf_packages() -> None:
    from asyncload.gguf import _metadata, _split

    assert gguf.Keys.General.ALIGNMENT == _metadata._ALIGNMENT_KEY
    assert gguf.GGUF_DEFAULT_ALIGNMENT == _metadata._DEFAULT_ALIGNMENT
    split = gguf.Keys.Split
    assert (split.LLM_KV_SPLIT_NO, split.LLM_KV_SPLIT_COUNT, split.LLM_KV_SPLIT_TENSORS_COUNT) == (
        _split._NUMBER_KEY,
        _split._COUNT_KEY,
        _split._TENSORS_KEY,
    )


def test_quantized_integer_and_bytes() -> None:
    assert GGMLType.Q4_K.quantized
    assert not GGMLType.BF16.quantized
    assert {member.name for member in GGMLType if member.integer} == {"I8", "I16", "I32", "I64"}
    assert GGMLType.Q8_1.nbytes(64) == 72
    assert GGMLType.I64.nbytes(3) == 24
    assert GGMLType.Q1_0.nbytes(0) == 0
    for wrong in (-32, 31, 33):
        with pytest.raises(ValueError, match="no whole blocks"):
            GGMLType.Q4_0.nbytes(wrong)
