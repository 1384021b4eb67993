"""A tensor gives itself to numpy and torch: same bytes, same memory, kept alive as long as anyone holds it."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from asyncload.device import DeviceInfo, open_device
from asyncload.errors import ClosedError, ExportError
from asyncload.memory import Purpose, VramTracker
from asyncload.model import Tensor
from asyncload.model._dlpack import open_capsule
from asyncload.quant import DType

MakeTensor = Callable[..., Tensor]
HostMemory = Callable[[bytes], Any]

ALL = list(DType)
BY_NUMPY = [dtype for dtype in ALL if dtype is not DType.BFLOAT16]
SHAPES = [(), (1,), (7,), (3, 68), (2, 1, 34), (0,), (4, 0), (0, 34)]


def random_bytes(nbytes: int) -> bytes:
    return np.random.default_rng(nbytes).bytes(nbytes)


def numpy_dtype(dtype: DType) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16 if dtype is DType.BFLOAT16 else dtype.value)


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("shape", SHAPES)
def test_numpy_shares_the_data(
    dtype: DType, shape: tuple[int, ...], make_tensor: MakeTensor, host_memory: HostMemory
) -> None:
    memory = host_memory(random_bytes(prod(shape) * dtype.itemsize))
    array = make_tensor(shape, dtype, memory=memory).numpy()
    assert array.shape == shape
    assert array.dtype == numpy_dtype(dtype)
    assert array.tobytes() == memory.content
    if array.size:
        array.view(np.uint8 if shape else array.dtype).flat[0] = 77
        assert array.tobytes() == memory.content


@pytest.mark.parametrize("dtype", BY_NUMPY)
@pytest.mark.parametrize("shape", SHAPES)
def test_numpy_from_dlpack(
    dtype: DType, shape: tuple[int, ...], make_tensor: MakeTensor, host_memory: HostMemory
) -> None:
    memory = host_memory(random_bytes(prod(shape) * dtype.itemsize))
    tensor = make_tensor(shape, dtype, memory=memory)
    array = np.from_dlpack(tensor)
    assert (array.shape, array.dtype) == (shape, numpy_dtype(dtype))
    assert array.tobytes() == memory.content
    assert not array.size or array.__array_interface__["data"][0] == tensor.address


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_from_dlpack(
    dtype: DType, shape: tuple[int, ...], make_tensor: MakeTensor, host_memory: HostMemory, torch: Any
) -> None:
    memory = host_memory(random_bytes(prod(shape) * dtype.itemsize))
    tensor = make_tensor(shape, dtype, memory=memory)
    theirs = torch.from_dlpack(tensor)
    assert tuple(theirs.shape) == shape
    assert theirs.dtype == getattr(torch, dtype.value)
    assert theirs.device == torch.device("cpu")
    assert theirs.is_contiguous()
    assert bytes(theirs.flatten().view(torch.uint8).tolist()) == memory.content
    if theirs.numel():
        assert theirs.data_ptr() == tensor.address
        theirs.fill_(1)
        assert tensor.numpy().ravel()[0] == 1


@pytest.mark.torch
def test_bfloat16_means_the_same_numbers_in_torch_and_numpy(make_tensor: MakeTensor, torch: Any) -> None:
    tensor = make_tensor((5,), DType.BFLOAT16)
    torch.from_dlpack(tensor).copy_(torch.tensor([0.0, 1.0, -2.5, 3e38, float("inf")]))
    expected = np.array([0.0, 1.0, -2.5, 3e38, np.inf], np.float32).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(tensor.numpy(), expected)


@pytest.mark.torch
def test_torch_takes_a_legacy_capsule(make_tensor: MakeTensor, host_memory: HostMemory, torch: Any) -> None:
    memory = host_memory(random_bytes(24))
    theirs = torch.utils.dlpack.from_dlpack(make_tensor((3, 4), DType.BFLOAT16, memory=memory).__dlpack__())
    assert theirs.dtype == torch.bfloat16
    assert bytes(theirs.flatten().view(torch.uint8).tolist()) == memory.content


def test_a_tensor_in_the_middle_of_its_memory(make_tensor: MakeTensor, host_memory: HostMemory) -> None:
    memory = host_memory(np.arange(8, dtype=np.float32).tobytes())
    tensor = make_tensor((2,), DType.FLOAT32, memory=memory, offset=12)
    assert tensor.address == memory.address + 12
    assert tensor.numpy().tolist() == [3, 4]
    assert np.from_dlpack(tensor).tolist() == [3, 4]


def test_asarray(make_tensor: MakeTensor, host_memory: HostMemory) -> None:
    tensor = make_tensor((3,), DType.FLOAT32, memory=host_memory(np.array([1, 2, 3], np.float32).tobytes()))
    shared = np.asarray(tensor)
    shared[0] = 9
    assert tensor.numpy()[0] == 9
    assert np.asarray(tensor, dtype=np.float64).dtype == np.float64
    assert not np.shares_memory(np.array(tensor, copy=True), shared)
    with pytest.raises(ValueError, match="copy"):
        np.array(tensor, dtype=np.float64, copy=False)


# --- the protocol ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_version", "name"),
    [(None, "dltensor"), ((0, 8), "dltensor"), ((1, 0), "dltensor_versioned"), ((1, 3), "dltensor_versioned")],
)
@pytest.mark.parametrize("kind", ["host", "cuda"])
def test_capsule(
    max_version: tuple[int, int] | None,
    name: str,
    kind: str,
    make_tensor: MakeTensor,
    request: pytest.FixtureRequest,
) -> None:
    device: DeviceInfo = request.getfixturevalue(kind)
    tensor = make_tensor((3, 4), DType.BFLOAT16, device=device)
    capsule = tensor.__dlpack__(max_version=max_version)
    assert f'"{name}"' in repr(capsule)
    seen, flags = open_capsule(capsule)
    expected = (1, 0) if kind == "host" else (2, 1)
    assert tensor.__dlpack_device__() == expected
    assert (seen.device.device_type, seen.device.device_id) == expected
    assert (seen.dtype.code, seen.dtype.bits, seen.dtype.lanes) == (4, 16, 1)
    assert tuple(seen.shape[: seen.ndim]) == (3, 4)
    assert not seen.strides or tuple(seen.strides[: seen.ndim]) == (4, 1)
    assert (seen.data, seen.byte_offset, flags) == (tensor.address, 0, 0)


@pytest.mark.parametrize("dtype", ALL)
def test_the_codes_of_all_dtypes(dtype: DType, make_tensor: MakeTensor) -> None:
    codes = {"int": 0, "uin": 1, "flo": 2, "bfl": 4}  # DLDataTypeCode
    capsule = make_tensor((2, 34), dtype).__dlpack__()
    seen, _ = open_capsule(capsule)
    assert (seen.dtype.code, seen.dtype.bits) == (codes[dtype.value[:3]], dtype.itemsize * 8)


@pytest.mark.parametrize("max_version", [None, (1, 0)])
def test_an_empty_tensor_has_no_address(
    max_version: tuple[int, int] | None, make_tensor: MakeTensor, host_memory: HostMemory, cuda: DeviceInfo
) -> None:
    tensor = make_tensor((4, 0), DType.FLOAT32, device=cuda, memory=host_memory(bytes(16)), offset=16)
    capsule = tensor.__dlpack__(max_version=max_version)
    seen, _ = open_capsule(capsule)
    assert (tensor.address, seen.data, tuple(seen.shape[:2])) == (0, None, (4, 0))


@pytest.mark.parametrize("stream", [None, -1])
def test_streams_on_the_host(stream: int | None, make_tensor: MakeTensor) -> None:
    make_tensor((2,), DType.FLOAT32).__dlpack__(stream=stream)


@pytest.mark.parametrize("stream", [None, -1, 1, 2, 0x7F00_1234_5678])
def test_streams_on_cuda(stream: int | None, make_tensor: MakeTensor, cuda: DeviceInfo) -> None:
    make_tensor((2,), DType.FLOAT32, device=cuda).__dlpack__(stream=stream)


@pytest.mark.parametrize(("kind", "stream"), [("host", 0), ("host", 1), ("cuda", 0), ("cuda", -2)])
def test_streams_that_do_not_exist(
    kind: str, stream: int, make_tensor: MakeTensor, request: pytest.FixtureRequest
) -> None:
    tensor = make_tensor((2,), DType.FLOAT32, device=request.getfixturevalue(kind))
    with pytest.raises(ExportError, match="no stream"):
        tensor.__dlpack__(stream=stream)


def test_another_device_is_a_buffer_error(make_tensor: MakeTensor, cuda: DeviceInfo) -> None:
    tensor = make_tensor((2,), DType.FLOAT32, device=cuda)
    tensor.__dlpack__(dl_device=(2, 1))
    for elsewhere in ((1, 0), (2, 0)):
        with pytest.raises(BufferError, match=r"blk\.3\.attn_q\.weight"):
            tensor.__dlpack__(dl_device=elsewhere)
    assert np.from_dlpack(make_tensor((2,), DType.FLOAT32), device="cpu").tolist() == [0, 0]


def test_a_copy_on_the_host_is_a_copy(make_tensor: MakeTensor, host_memory: HostMemory) -> None:
    memory = host_memory(np.array([1, 2], np.float32).tobytes())
    copied = np.from_dlpack(make_tensor((2,), DType.FLOAT32, memory=memory), copy=True)
    copied[:] = 0
    assert np.frombuffer(memory.content, np.float32).tolist() == [1, 2]
    shared = np.from_dlpack(make_tensor((2,), DType.FLOAT32, memory=memory), copy=False)
    shared[:] = 5
    assert np.frombuffer(memory.content, np.float32).tolist() == [5, 5]


def test_no_copy_on_a_device(make_tensor: MakeTensor, cuda: DeviceInfo) -> None:
    with pytest.raises(BufferError, match="copies"):
        make_tensor((2,), DType.FLOAT32, device=cuda).__dlpack__(copy=True)


def test_numpy_on_a_device_says_what_to_do(make_tensor: MakeTensor, cuda: DeviceInfo) -> None:
    tensor = make_tensor((2,), DType.FLOAT32, device=cuda)
    for attempt in (tensor.numpy, lambda: np.asarray(tensor)):
        with pytest.raises(ExportError, match="cuda:1") as caught:
            attempt()
        assert caught.value.tensor == tensor.name


def test_bfloat16_without_ml_dtypes_says_what_to_do(make_tensor: MakeTensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ExportError, match="pip install ml_dtypes"):
        make_tensor((2,), DType.BFLOAT16).numpy()


@pytest.mark.parametrize("dtype", BY_NUMPY)
def test_cuda_array_interface(dtype: DType, make_tensor: MakeTensor, cuda: DeviceInfo) -> None:
    tensor = make_tensor((2, 34), dtype, device=cuda)
    interface = tensor.__cuda_array_interface__
    assert np.dtype(interface["typestr"]) == numpy_dtype(dtype)
    assert interface["shape"] == (2, 34)
    assert interface["data"] == (tensor.address, False)
    assert (interface["version"], interface["strides"], interface["stream"]) == (3, None, None)


def test_cuda_array_interface_is_absent_where_it_cannot_be(make_tensor: MakeTensor, cuda: DeviceInfo) -> None:
    assert not hasattr(make_tensor((2,), DType.FLOAT32), "__cuda_array_interface__")
    assert not hasattr(make_tensor((2,), DType.BFLOAT16, device=cuda), "__cuda_array_interface__")


# --- lifetime -------------------------------------------------------------------------------------------------------

VIEWS: dict[str, Callable[[Tensor], object]] = {
    "numpy": lambda tensor: tensor.numpy(),
    "asarray": np.asarray,
    "bfloat16": lambda tensor: tensor.numpy().view(np.uint16)[1:],
    "legacy": lambda tensor: tensor.__dlpack__(),
    "versioned": lambda tensor: tensor.__dlpack__(max_version=(1, 0)),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_memory_goes_with_the_last_view(
    view: Callable[[Tensor], object], make_tensor: MakeTensor, host_memory: HostMemory
) -> None:
    memory = host_memory(bytes(8))
    alive = weakref.ref(memory)
    tensor = make_tensor((4,), DType.BFLOAT16, memory=memory)
    del memory
    first, second = view(tensor), view(tensor)
    tensor.close()
    del tensor
    assert alive() is not None
    del first
    assert alive() is not None
    del second
    assert alive() is None


@pytest.mark.parametrize("max_version", [None, (1, 0)])
def test_numpy_views_of_views_hold_the_memory(
    max_version: tuple[int, int] | None, make_tensor: MakeTensor, host_memory: HostMemory
) -> None:
    memory = host_memory(bytes(16))
    alive = weakref.ref(memory)
    tensor = make_tensor((4,), DType.FLOAT32, memory=memory)
    del memory

    class Exporter:
        def __dlpack_device__(self) -> tuple[int, int]:
            return tensor.__dlpack_device__()

        def __dlpack__(self, **_: Any) -> Any:
            return tensor.__dlpack__(max_version=max_version)

    array = np.from_dlpack(Exporter())[1:].reshape(3, 1)
    tensor.close()
    assert alive() is not None
    del array
    assert alive() is None


@pytest.mark.torch
def test_torch_views_hold_the_memory(make_tensor: MakeTensor, host_memory: HostMemory, torch: Any) -> None:
    memory = host_memory(bytes(16))
    alive = weakref.ref(memory)
    tensor = make_tensor((4, 2), DType.BFLOAT16, memory=memory)
    del memory
    theirs = torch.from_dlpack(tensor)
    part = theirs[1:].T
    tensor.close()
    del tensor, theirs
    assert alive() is not None
    del part
    assert alive() is None


@pytest.mark.torch
def test_the_last_view_may_go_on_another_thread(make_tensor: MakeTensor, host_memory: HostMemory, torch: Any) -> None:
    memory = host_memory(bytes(16))
    alive = weakref.ref(memory)
    held = [torch.from_dlpack(make_tensor((4,), DType.FLOAT32, memory=memory))]
    del memory
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert alive() is None


@pytest.mark.parametrize("max_version", [None, (1, 0)])
def test_the_deleter_needs_no_interpreter_lock(
    max_version: tuple[int, int] | None, make_tensor: MakeTensor, host_memory: HostMemory
) -> None:
    """As a consumer's native thread calls it: ctypes lets go of the lock around the call."""
    memory = host_memory(bytes(16))
    alive = weakref.ref(memory)
    capsule = make_tensor((4,), DType.FLOAT32, memory=memory).__dlpack__(max_version=max_version)
    del memory
    name, position = (b"dltensor", 56) if max_version is None else (b"dltensor_versioned", 16)
    get = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    rename = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_SetName", ctypes.pythonapi))
    used = b"used_" + name
    pointer = get(capsule, name)
    assert rename(capsule, used) == 0
    deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(ctypes.c_void_p.from_address(pointer + position).value or 0)
    assert alive() is not None
    thread = threading.Thread(target=deleter, args=(pointer,))
    thread.start()
    thread.join()
    assert alive() is None
    del capsule


def test_ten_thousand_exports_leave_nothing_behind(make_tensor: MakeTensor, host_memory: HostMemory) -> None:
    memory = host_memory(bytes(16))
    tensor = make_tensor((4,), DType.FLOAT32, memory=memory)
    before = sys.getrefcount(memory)
    for _ in range(5_000):
        tensor.__dlpack__()
        np.from_dlpack(tensor)
    assert sys.getrefcount(memory) == before
    gc.collect()
    counted = len(gc.get_objects())
    for _ in range(5_000):
        tensor.__dlpack__(max_version=(1, 0))
        tensor.numpy()
    gc.collect()
    assert len(gc.get_objects()) < counted + 100


@pytest.mark.parametrize("take", [np.from_dlpack, Tensor.numpy], ids=["from_dlpack", "numpy"])
def test_the_ledger_sees_the_last_view_go(take: Callable[[Tensor], Any], make_tensor: MakeTensor) -> None:
    device = open_device("host")
    tracker = VramTracker(device)
    memory = tracker.allocate(64, Purpose.WEIGHTS, "a weight")
    tensor = make_tensor((16,), DType.FLOAT32, memory=memory, device=device.info)
    held = [take(tensor)]
    tensor.close()
    del memory, tensor
    tracker.flush()
    assert tracker.total == 64
    held[0][:] = 3
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    tracker.flush()
    assert tracker.total == 0
    tracker.close()
    device.close()


def test_closed_tensors_refuse_and_their_views_stay(make_tensor: MakeTensor, host_memory: HostMemory) -> None:
    tensor = make_tensor((2,), DType.FLOAT32, memory=host_memory(np.array([1, 2], np.float32).tobytes()))
    array = np.from_dlpack(tensor)
    tensor.close()
    tensor.close()
    assert tensor.closed
    for use in (
        tensor.numpy,
        tensor.__dlpack__,
        lambda: tensor.address,
        lambda: tensor.memory,
        lambda: np.asarray(tensor),
    ):
        with pytest.raises(ClosedError, match=r"blk\.3\.attn_q\.weight"):
            use()
    assert array.tolist() == [1, 2]
    assert (tensor.shape, tensor.__dlpack_device__()) == ((2,), (1, 0))


def test_who_took_the_cuda_array_interface_holds_the_memory_by_the_tensor(
    make_tensor: MakeTensor, host_memory: HostMemory, cuda: DeviceInfo
) -> None:
    memory = host_memory(bytes(8))
    alive = weakref.ref(memory)
    tensor = make_tensor((2,), DType.FLOAT32, memory=memory, device=cuda)
    del memory
    assert tensor.__cuda_array_interface__["data"][0] == tensor.address
    tensor.close()
    assert alive() is not None  # a consumer keeps the tensor, and reads at the address that it was told
    with pytest.raises(ClosedError):
        _ = tensor.__cuda_array_interface__
    del tensor
    assert alive() is None


SHUTDOWN = """
    import ctypes, sys, threading, time
    import numpy as np
    from asyncload.device import DeviceInfo, open_device
    from asyncload.gguf import GGMLType
    from asyncload.memory import Purpose, VramTracker
    from asyncload.model import Tensor
    from asyncload.quant import DType

    class Memory:
        nbytes = 64
        def __init__(self):
            self.buffer = ctypes.create_string_buffer(64)
            self.address = ctypes.addressof(self.buffer)
        def __del__(self):
            self.buffer = None

    def tensor():
        device = DeviceInfo(name="host", kind="host", index=0, model="", total_bytes=1)
        return Tensor("a", shape=(16,), logical_shape=(16,), dtype=DType.FLOAT32, type=GGMLType.F32, device=device,
                      memory=Memory())

    {use}
    sys.held = views  # longer than the module's globals
    threading.Thread(target=lambda views: time.sleep(60), args=(views,), daemon=True).start()
"""


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(
            "views = [tensor(), tensor().numpy(), np.from_dlpack(tensor()), tensor().__dlpack__()]", id="numpy"
        ),
        pytest.param(
            "Memory = lambda: VramTracker(open_device('host')).allocate(64, Purpose.WEIGHTS, 'a'); "
            "views = [tensor(), tensor().numpy(), np.from_dlpack(tensor()), tensor().__dlpack__()]",
            id="allocation",
        ),
        pytest.param(
            "import torch; views = [torch.from_dlpack(tensor()), torch.from_dlpack(tensor())[2:]]; views.append(views)",
            id="torch",
            marks=pytest.mark.torch,
        ),
    ],
)
def test_the_interpreter_ends_cleanly_with_views_alive(use: str) -> None:
    script = textwrap.dedent(SHUTDOWN).format(use=use)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
