from __future__ import annotations

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from asyncload.errors import OptionsError
from asyncload.gguf import GGMLType
from asyncload.quant import FAMILIES, DType, can_decode, native_dtype
from asyncload.quant._kernels import DECODERS
from asyncload.quant.cuda._source import read
from tests.quant import oracle


@pytest.mark.parametrize(
    ("texts", "dtype"),
    [
        (("bf16", "bfloat16", " BF16 "), DType.BFLOAT16),
        (("f16", "fp16", "half", "float16", "Half"), DType.FLOAT16),
        (("f32", "fp32", "float", "float32"), DType.FLOAT32),
        (("int8", "i8"), DType.INT8),
    ],
)
def test_names_and_short_forms(texts: tuple[str, ...], dtype: DType) -> None:
    assert {DType.parse(text) for text in texts} == {dtype}


@pytest.mark.parametrize("text", ["", "float8", "q4_k", "packed", "bfloat"])
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(OptionsError) as caught:
        DType.parse(text)
    assert caught.value.option == "dtype"


@pytest.mark.parametrize("dtype", DType)
def test_sizes_are_those_of_numpy(dtype: DType) -> None:
    assert dtype.itemsize == np.dtype(ml_dtypes.bfloat16 if dtype is DType.BFLOAT16 else str(dtype)).itemsize
    assert str(dtype) == dtype.value


@pytest.mark.parametrize("type_", GGMLType)
def test_plain_types_are_native_and_of_the_same_size(type_: GGMLType) -> None:
    native = native_dtype(type_)
    if type_.quantized:
        assert native is None
    else:
        assert native is not None
        assert native.itemsize == type_.type_size
        assert can_decode(type_, native)


def test_the_table_is_what_has_a_decoder() -> None:
    homes = {type_: f"asyncload.quant._{family}" for type_, family in FAMILIES.items()}
    assert {type_: decoder.__module__ for type_, decoder in DECODERS.items()} == homes
    assert {type_ for type_ in GGMLType if can_decode(type_, DType.FLOAT16)} == FAMILIES.keys()


@pytest.mark.parametrize("type_", oracle.STORED, ids=lambda type_: type_.name)
def test_every_type_that_weights_are_stored_as_has_kernels_at_both_places(type_: GGMLType) -> None:
    assert DECODERS[type_].__module__ == f"asyncload.quant._{FAMILIES[type_]}"
    assert f"struct {type_.name} " in read(FAMILIES[type_])


@pytest.mark.parametrize(
    ("type_", "dtype"),
    [
        (GGMLType.I32, DType.FLOAT32),
        (GGMLType.F32, DType.INT32),
        (GGMLType.Q4_K, DType.UINT8),
        (GGMLType.F32, DType.FLOAT64),
        (GGMLType.Q8_K, DType.FLOAT32),
    ],
)
def test_what_cannot_be_decoded(type_: GGMLType, dtype: DType) -> None:
    assert not can_decode(type_, dtype)


def test_asking_what_can_be_decoded_loads_neither_numpy_nor_numba() -> None:
    script = """
import sys
from asyncload.gguf import GGMLType
from asyncload.quant import DType, can_decode
assert can_decode(GGMLType.Q4_K, DType.parse("bf16"))
assert not {"numpy", "numba", "llvmlite", "gguf"} & sys.modules.keys(), sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
