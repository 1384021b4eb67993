"""Callers' buffers as targets: whose they are, where they lie, and that only those that fit are taken."""

from __future__ import annotations

import array
import ctypes
import mmap
import weakref
from collections.abc import Callable
from typing import Any, Literal

import ml_dtypes
import numpy as np
import pytest

from asyncload.device import DeviceInfo, DeviceMemory
from asyncload.errors import TargetError
from asyncload.model import Target, Tensor, borrow, check_disjoint, check_target
from asyncload.model._dlpack import dtype_of, open_capsule
from asyncload.model._target import _is_contiguous
from asyncload.quant import DType

MakeTensor = Callable[..., Tensor]


def take(buffer: object) -> Target:
    return borrow(buffer, tensor_name="a.weight")


def target(
    shape: tuple[int, ...],
    dtype: DType | None,
    *,
    address: int = 4096,
    nbytes: int | None = None,
    kind: Literal["cuda", "host"] = "host",
    index: int | None = 0,
) -> Target:
    size = int(np.prod(shape)) * (dtype.itemsize if dtype else 1) if nbytes is None else nbytes
    return Target(address, size, shape, dtype, kind, index, None)


# --- borrowing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(DType))
def test_numpy_arrays(dtype: DType) -> None:
    buffer = np.zeros((3, 4), ml_dtypes.bfloat16 if dtype is DType.BFLOAT16 else dtype.value)
    taken = take(buffer)
    assert (taken.address, taken.nbytes) == (buffer.ctypes.data, buffer.nbytes)
    assert (taken.shape, taken.dtype, taken.kind, taken.index) == ((3, 4), dtype, "host", 0)
    assert taken.memory == DeviceMemory(taken.address, taken.nbytes)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", list(DType))
def test_torch_tensors(dtype: DType, torch: Any) -> None:
    buffer = torch.zeros((5, 4), dtype=getattr(torch, dtype.value))[2:]
    taken = take(buffer)
    assert (taken.address, taken.nbytes) == (buffer.data_ptr(), 12 * dtype.itemsize)
    assert (taken.shape, taken.dtype, taken.kind, taken.index) == ((3, 4), dtype, "host", 0)


@pytest.mark.parametrize("dtype", list(DType))
def test_tensors_of_our_own(dtype: DType, make_tensor: MakeTensor) -> None:
    tensor = make_tensor((2, 34), dtype)
    taken = take(tensor)
    assert (taken.address, taken.nbytes) == (tensor.address, tensor.nbytes)
    assert (taken.shape, taken.dtype, taken.kind, taken.index) == ((2, 34), dtype, "host", 0)


def test_device_tensors_say_which_device(make_tensor: MakeTensor, cuda: DeviceInfo) -> None:
    taken = take(make_tensor((3,), DType.BFLOAT16, device=cuda))
    assert (taken.kind, taken.index, taken.dtype) == ("cuda", 1, DType.BFLOAT16)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: bytearray(12), id="bytearray"),
        pytest.param(lambda: memoryview(bytearray(16))[4:], id="memoryview"),
        pytest.param(lambda: mmap.mmap(-1, 12), id="mmap"),
        pytest.param(ctypes.c_uint8 * 12, id="ctypes"),
        pytest.param(lambda: array.array("B", bytes(12)), id="array"),
    ],
)
def test_plain_buffers(make: Callable[[], Any], host: DeviceInfo) -> None:
    buffer = make()
    taken = take(buffer)
    assert (taken.nbytes, taken.shape, taken.dtype) == (12, (12,), DType.UINT8)
    check_target(taken, (2, 6), DType.UINT8, host, "a.weight")
    ctypes.memset(taken.address, 7, taken.nbytes)
    assert bytes(buffer) == b"\7" * 12


def test_a_borrowed_bytearray_cannot_move() -> None:
    buffer = bytearray(12)
    taken = take(buffer)
    with pytest.raises(BufferError):
        buffer.extend(bytes(1 << 20))
    del taken
    buffer.extend(bytes(1 << 20))


def test_the_target_keeps_the_memory_alive(make_tensor: MakeTensor, host_memory: Callable[[bytes], Any]) -> None:
    memory = host_memory(bytes(8))
    alive = weakref.ref(memory)
    taken = take(make_tensor((2,), DType.FLOAT32, memory=memory))
    del memory
    assert alive() is not None
    del taken
    assert alive() is None


def test_the_target_is_memory_for_a_tensor(make_tensor: MakeTensor) -> None:
    buffer = np.arange(4, dtype=np.float32)
    tensor = make_tensor((4,), DType.FLOAT32, memory=take(buffer))
    assert np.shares_memory(tensor.numpy(), buffer)
    assert np.from_dlpack(tensor).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("shape", [(), (1,), (0,), (4, 0), (3, 1, 2)])
def test_shapes(shape: tuple[int, ...]) -> None:
    class OnlyDlpack:
        array = np.zeros(shape, np.float16)

        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

        def __dlpack__(self, **kwargs: Any) -> object:
            return self.array.__dlpack__(**kwargs)

    buffer = OnlyDlpack()
    for taken in (take(buffer), take(buffer.array)):
        assert (taken.shape, taken.nbytes, taken.dtype) == (shape, buffer.array.nbytes, DType.FLOAT16)


@pytest.mark.parametrize(
    ("shape", "strides", "contiguous"),
    [
        ((), (), True),
        ((3, 4), (4, 1), True),
        ((3, 4), (1, 3), False),
        ((3, 4), (8, 1), False),
        ((4,), (2,), False),
        ((4,), (-1,), False),
        ((1, 4), (999, 1), True),  # the stride of a single element means nothing
        ((3, 1, 4), (4, 0, 1), True),
        ((4, 0), (7, 7), True),  # nor does any where there are no elements
    ],
)
def test_contiguity(shape: tuple[int, ...], strides: tuple[int, ...], contiguous: bool) -> None:
    assert _is_contiguous(shape, strides) is contiguous
    assert _is_contiguous(shape, [stride * 4 for stride in strides], 4) is contiguous


# --- refusing -------------------------------------------------------------------------------------------------------


def frozen(buffer: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    buffer.flags.writeable = False
    return buffer


class Frozen:
    """A read-only exporter of versioned capsules."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def __dlpack__(self, **kwargs: Any) -> object:
        return frozen(np.zeros(4, np.float32)).__dlpack__(**kwargs)


class Copied(Frozen):
    """An exporter that gives copies whatever it was asked."""

    def __dlpack__(self, **kwargs: Any) -> object:
        return np.zeros(4, np.float32).__dlpack__(max_version=(1, 0), copy=True)


class Consumed(Frozen):
    """No exporter at all."""

    def __dlpack__(self, **kwargs: Any) -> object:
        return object()


class Newer(Frozen):
    """An exporter of a DLPack that is not out yet."""

    def __dlpack__(self, **kwargs: Any) -> object:
        capsule = np.zeros(4, np.float32).__dlpack__(**kwargs)
        address = ctypes.addressof(open_capsule(capsule)[0])
        ctypes.c_uint32.from_address(address - 32).value = 2  # the major version, in front of the rest
        return capsule


class Elsewhere(Frozen):
    """An exporter on a device of another make."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return (8, 0)


class Strided(Frozen):
    """An exporter of every other element."""

    def __dlpack__(self, **kwargs: Any) -> object:
        return np.zeros(8, np.float32)[::2].__dlpack__(**kwargs)


@pytest.mark.parametrize(
    ("buffer", "why"),
    [
        pytest.param(frozen(np.zeros(4)), "read-only", id="read-only array"),
        pytest.param(b"1234", "cannot be filled", id="bytes"),
        pytest.param(memoryview(b"1234"), "read-only", id="read-only view"),
        pytest.param(np.zeros((4, 4))[:, 1], "not C-contiguous", id="column"),
        pytest.param(np.zeros((4, 4)).T, "not C-contiguous", id="transposed"),
        pytest.param(np.zeros(4)[::-1], "not C-contiguous", id="reversed"),
        pytest.param(Frozen(), "read-only", id="read-only capsule"),
        pytest.param(Copied(), "copy", id="copied capsule"),
        pytest.param(Consumed(), "no DLPack capsule", id="no capsule"),
        pytest.param(Newer(), "version 2", id="newer capsule"),
        pytest.param(Elsewhere(), "device of DLPack type 8", id="other device"),
        pytest.param(Strided(), "not C-contiguous", id="strided capsule"),
        pytest.param([1, 2], "list", id="list"),
        pytest.param(None, "NoneType", id="None"),
        pytest.param(7, "int", id="int"),
        pytest.param("text", "str", id="str"),
    ],
)
def test_what_cannot_be_filled(buffer: object, why: str) -> None:
    with pytest.raises(TargetError, match=why) as caught:
        take(buffer)
    assert caught.value.tensor == "a.weight"
    assert "a.weight" in str(caught.value)


def test_misaligned() -> None:
    with pytest.raises(TargetError, match="no multiple of the 4 bytes"):
        take(np.zeros(17, np.uint8)[1:].view(np.float32))


@pytest.mark.torch
def test_torch_tensors_that_cannot_be_filled(torch: Any) -> None:
    with pytest.raises(TargetError, match="require gradient"):
        take(torch.zeros(4, requires_grad=True))
    with pytest.raises(TargetError, match="not C-contiguous"):
        take(torch.zeros(4, 4).T)
    with pytest.raises(TargetError, match="cannot be filled"):
        take(torch.zeros(4).to_sparse())
    with pytest.raises(TargetError, match="cannot be filled"):
        take(torch.zeros(4, device="meta"))


def test_a_closed_tensor_cannot_be_filled(make_tensor: MakeTensor) -> None:
    tensor = make_tensor((2,), DType.FLOAT32)
    tensor.close()
    with pytest.raises(TargetError, match="closed"):
        take(tensor)


@pytest.mark.parametrize("dtype", [">f4", "bool", "uint32", "complex64", "M8[s]"])
def test_other_dtypes_are_none_of_ours(dtype: str, host: DeviceInfo) -> None:
    taken = take(np.zeros(4, dtype))
    assert taken.dtype is None
    for wanted in (DType.FLOAT32, DType.UINT8):
        with pytest.raises(TargetError, match="of another dtype"):
            check_target(taken, (4,), wanted, host, "a.weight")


# --- old exporters and the CUDA array interface ---------------------------------------------------------------------


def test_an_exporter_from_before_dlpack_1() -> None:
    class Old:
        array = np.zeros((2, 3), np.float32)

        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

        def __dlpack__(self) -> object:
            return self.array.__dlpack__()

    taken = take(Old())
    assert (taken.address, taken.shape, taken.dtype) == (Old.array.ctypes.data, (2, 3), DType.FLOAT32)


@pytest.mark.parametrize(
    ("device", "kind", "index", "streams"),
    [((1, 0), "host", 0, []), ((2, 3), "cuda", 3, [-1]), ((3, 2), "host", 0, []), ((13, 0), "cuda", None, [-1])],
)
def test_devices_and_streams(device: tuple[int, int], kind: str, index: int | None, streams: list[Any]) -> None:
    asked: list[Any] = []

    class Exporter:
        def __dlpack_device__(self) -> tuple[int, int]:
            return device

        def __dlpack__(self, *, stream: Any = "none", **kwargs: Any) -> object:
            asked.append(stream)
            assert kwargs == {"max_version": (1, 0), "copy": False}
            capsule = np.zeros(3, np.float32).__dlpack__(**kwargs)
            tensor, _ = open_capsule(capsule)
            tensor.device.device_type, tensor.device.device_id = device
            tensor.byte_offset = 4
            return capsule

    taken = take(Exporter())
    assert (taken.kind, taken.index) == (kind, index)
    assert asked == (streams or ["none"])


def test_byte_offset_counts() -> None:
    class Exporter:
        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

        def __dlpack__(self, **kwargs: Any) -> object:
            capsule = np.zeros(3, np.float32).__dlpack__(**kwargs)
            tensor, _ = open_capsule(capsule)
            tensor.data, tensor.byte_offset = 0x10000, 64
            return capsule

    assert take(Exporter()).address == 0x10040


def test_dtypes_that_are_vectors_or_smaller_than_a_byte() -> None:
    capsule = np.zeros(3, np.float32).__dlpack__()
    tensor, _ = open_capsule(capsule)
    assert dtype_of(tensor.dtype) is DType.FLOAT32
    tensor.dtype.lanes = 2
    assert dtype_of(tensor.dtype) is None
    tensor.dtype.lanes, tensor.dtype.bits = 1, 4
    assert dtype_of(tensor.dtype) is None


def cuda_array(**changes: Any) -> object:
    class CudaArray:
        __cuda_array_interface__ = {
            "version": 3,
            "shape": (2, 3),
            "typestr": "<f4",
            "data": (0x7F0000000000, False),
            "strides": None,
        } | changes

    return CudaArray()


def test_cuda_array_interface(cuda: DeviceInfo) -> None:
    for strides in (None, (12, 4)):
        taken = take(cuda_array(strides=strides))
        assert (taken.address, taken.nbytes) == (0x7F0000000000, 24)
        assert (taken.shape, taken.dtype, taken.kind, taken.index) == ((2, 3), DType.FLOAT32, "cuda", None)
        check_target(taken, (2, 3), DType.FLOAT32, cuda, "a.weight")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"data": (0x7F0000000000, True)}, "read-only"),
        ({"strides": (4, 8)}, "not C-contiguous"),
        ({"mask": object()}, "masked"),
        ({"typestr": "nonsense"}, "cannot be filled"),
    ],
)
def test_cuda_arrays_that_cannot_be_filled(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(TargetError, match=why):
        take(cuda_array(**changes))


# --- does it fit ----------------------------------------------------------------------------------------------------


def test_shape_and_dtype_must_be_the_tensors(host: DeviceInfo) -> None:
    check_target(target((3, 4), DType.BFLOAT16), (3, 4), DType.BFLOAT16, host, "a.weight")
    for shape, dtype in (
        ((4, 3), DType.BFLOAT16),
        ((12,), DType.BFLOAT16),
        ((3, 4), DType.FLOAT16),
        ((3, 5), DType.BFLOAT16),
        ((24,), DType.UINT8),
    ):
        with pytest.raises(TargetError, match=r"a\.weight") as caught:
            check_target(target(shape, dtype), (3, 4), DType.BFLOAT16, host, "a.weight")
        assert (caught.value.needed, caught.value.available) == (24, int(np.prod(shape)) * dtype.itemsize)


@pytest.mark.parametrize("dtype", [DType.UINT8, DType.INT8])
def test_packed_blocks_fit_any_bytes_of_their_size(dtype: DType, host: DeviceInfo) -> None:
    for shape in ((2, 34), (68,), (1, 68)):
        check_target(target(shape, dtype), (2, 34), DType.UINT8, host, "a.weight")
    for shape in ((67,), (69,), (0,)):
        with pytest.raises(TargetError) as caught:
            check_target(target(shape, dtype), (2, 34), DType.UINT8, host, "a.weight")
        assert (caught.value.needed, caught.value.available) == (68, shape[0])


def test_packed_blocks_fit_nothing_but_bytes(host: DeviceInfo) -> None:
    with pytest.raises(TargetError):
        check_target(target((17,), DType.FLOAT32), (2, 34), DType.UINT8, host, "a.weight")


@pytest.mark.parametrize(
    ("kind", "index", "fits"), [("cuda", 1, True), ("cuda", None, True), ("cuda", 0, False), ("host", 1, False)]
)
def test_device(kind: Literal["cuda", "host"], index: int | None, fits: bool, cuda: DeviceInfo) -> None:
    given = target((4,), DType.FLOAT32, kind=kind, index=index)
    if fits:
        check_target(given, (4,), DType.FLOAT32, cuda, "a.weight")
        return
    with pytest.raises(TargetError, match="cuda:1") as caught:
        check_target(given, (4,), DType.FLOAT32, cuda, "a.weight")
    assert given.device in str(caught.value)


def test_overlapping_targets() -> None:
    targets = {
        "a": target((4,), DType.FLOAT32, address=4096),
        "b": target((4,), DType.FLOAT32, address=4112),
        "empty": target((0,), DType.FLOAT32, address=4100),
        "elsewhere": target((4,), DType.FLOAT32, address=4096, kind="cuda"),
    }
    check_disjoint(targets)
    with pytest.raises(TargetError, match="overlap") as caught:
        check_disjoint(targets | {"c": target((1,), DType.UINT8, address=4127)})
    assert caught.value.tensor == "c"
