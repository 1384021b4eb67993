"""A test of CUDA kernels that asks for ``type_`` and ``dtype`` runs once for each pair that there is a kernel for."""

from __future__ import annotations

import pytest

from asyncload.quant import FAMILIES, DType
from asyncload.quant.cuda import can_decode
from tests.quant import oracle

PAIRS = [(type_, dtype) for type_ in FAMILIES for dtype in DType if can_decode(type_, dtype)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize(("type_", "dtype"), oracle.parameters(PAIRS))
