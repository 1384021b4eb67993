"""The table of the driver's functions, filled from a library that is there, is not, or lacks something."""

from __future__ import annotations

import pytest

from tests.native.stub_cuda import StubCuda

pytestmark = pytest.mark.native

OUT_OF_MEMORY = 2


def test_calls_reach_the_library(stub_cuda: StubCuda) -> None:
    from asyncload_native import Driver

    assert Driver(stub_cuda.path).version == 13000
    assert stub_cuda.calls("cuDriverGetVersion") == 1


def test_a_missing_library_is_named() -> None:
    from asyncload_native import Driver, DriverUnavailableError

    with pytest.raises(DriverUnavailableError, match=r"libnone\.so\.1: cannot open shared object file") as caught:
        Driver("libnone.so.1")
    assert isinstance(caught.value, ImportError)


def test_a_missing_function_is_named() -> None:
    from asyncload_native import Driver, DriverUnavailableError

    with pytest.raises(DriverUnavailableError, match=r"libc\.so\.6: undefined symbol: cuInit"):
        Driver("libc.so.6")


def test_a_failure_says_what_was_called_and_what_came_back(stub_cuda: StubCuda) -> None:
    from asyncload_native import CudaError, DeviceError, Driver

    stub_cuda.fail("cuDriverGetVersion", OUT_OF_MEMORY)
    with pytest.raises(
        CudaError, match=r"^cuDriverGetVersion: CUDA_ERROR_OUT_OF_MEMORY \(2\): out of memory$"
    ) as caught:
        _ = Driver(stub_cuda.path).version
    error = caught.value
    assert (error.function, error.code, error.name) == ("cuDriverGetVersion", 2, "CUDA_ERROR_OUT_OF_MEMORY")
    assert isinstance(error, DeviceError)


def test_a_failure_without_a_name_has_its_number(stub_cuda: StubCuda) -> None:
    from asyncload_native import CudaError, Driver

    stub_cuda.fail("cuDriverGetVersion", 4711)
    with pytest.raises(CudaError, match=r"\(4711\)") as caught:
        _ = Driver(stub_cuda.path).version
    assert caught.value.code == 4711
