"""The references agree with each other, so that it does not matter which of them a kernel is held against."""

from __future__ import annotations

import numpy as np
import pytest

from asyncload.gguf import GGMLType
from asyncload.quant import DType
from tests.quant import oracle

QUANTIZED = [type_ for type_ in oracle.STORED if type_.quantized]


@pytest.mark.ggml
@pytest.mark.parametrize("type_", QUANTIZED, ids=lambda type_: type_.name)
def test_ggml_and_gguf_decode_to_the_same_bits(type_: GGMLType) -> None:
    try:
        values = oracle.by_gguf(type_, oracle.blocks(type_))
    except (NotImplementedError, ValueError):
        assert type_ in oracle.ONLY_GGML
    else:
        assert oracle.mistakes(type_, DType.FLOAT32, values.view(np.uint8)) == 0


def test_a_mistake_is_a_mistake() -> None:
    values = oracle.by_gguf(GGMLType.Q4_0, oracle.blocks(GGMLType.Q4_0)).copy()
    values[:3].view(np.uint32)[:] ^= 1
    assert oracle.mistakes(GGMLType.Q4_0, DType.FLOAT32, values.view(np.uint8)) == 3
