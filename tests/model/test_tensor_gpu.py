"""Tensors in CUDA memory, seen and filled by torch and CuPy: same bytes, same memory, kept alive and given back."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import numpy as np
import pytest

from asyncload.device import Device, DeviceMemory, open_device
from asyncload.errors import ExportError, TargetError
from asyncload.gguf import GGMLType
from asyncload.memory import Allocation, Purpose, VramTracker
from asyncload.model import Target, Tensor, borrow, check_target
from asyncload.quant import DType

pytestmark = pytest.mark.gpu

BY_CUPY = [dtype for dtype in DType if dtype is not DType.BFLOAT16]
SHAPES = [(3, 4), (), (4, 0)]


@pytest.fixture
def device() -> Iterator[Device]:
    device = open_device("cuda:0")
    device.attach()
    yield device
    device.close()


@pytest.fixture
def tracker(device: Device) -> Iterator[VramTracker]:
    tracker = VramTracker(device)
    yield tracker
    tracker.close()


def content_of(nbytes: int) -> bytes:
    return np.random.default_rng(nbytes).bytes(nbytes)


def fill(device: Device, memory: DeviceMemory, content: bytes) -> None:
    if not content:
        return
    staging, stream = device.staging(len(content)), device.stream()
    staging.view[: len(content)] = content
    stream.upload(memory, 0, staging, 0, len(content))
    stream.record().synchronize()
    stream.close()
    staging.close()


def read(device: Device, memory: DeviceMemory) -> bytes:
    content = bytearray(memory.nbytes)
    device.barrier().synchronize()
    device.download(memory, 0, memoryview(content))
    return bytes(content)


@pytest.fixture
def make(device: Device, tracker: VramTracker) -> Callable[..., Tensor]:
    def make(shape: tuple[int, ...], dtype: DType, memory: Allocation | Target | None = None) -> Tensor:
        nbytes = prod(shape) * dtype.itemsize
        if memory is None:
            memory = tracker.allocate(nbytes, Purpose.WEIGHTS, "a.weight")
            fill(device, memory.memory, content_of(nbytes))
        return Tensor(
            "a.weight",
            shape=shape,
            logical_shape=shape,
            dtype=dtype,
            type=GGMLType.Q8_0,
            device=device.info,
            memory=memory,
        )

    return make


MakeTensor = Callable[..., Tensor]


@pytest.mark.torch
def test_torch_shares_every_dtype(make: MakeTensor, device: Device, torch: Any) -> None:
    for dtype in DType:
        for shape in SHAPES:
            tensor = make(shape, dtype)
            theirs = torch.from_dlpack(tensor)
            assert (tuple(theirs.shape), theirs.dtype) == (shape, getattr(torch, dtype.value))
            assert theirs.device == torch.device("cuda:0")
            assert theirs.data_ptr() == tensor.address
            assert bytes(theirs.cpu().reshape(-1).view(torch.uint8).tolist()) == content_of(tensor.nbytes)
            if theirs.numel():
                theirs.fill_(0)
                assert read(device, DeviceMemory(tensor.address, tensor.nbytes)) == bytes(tensor.nbytes)


@pytest.mark.cupy
def test_cupy_shares_every_dtype_that_it_has(make: MakeTensor, cupy: Any) -> None:
    takers: list[Callable[[Tensor], Any]] = [cupy.from_dlpack, cupy.asarray]
    for dtype in BY_CUPY:
        for shape in SHAPES:
            for take in takers:
                tensor = make(shape, dtype)
                theirs = take(tensor)
                assert (theirs.shape, theirs.dtype) == (shape, np.dtype(dtype.value))
                assert not theirs.size or theirs.data.ptr == tensor.address
                assert cupy.asnumpy(theirs).tobytes() == content_of(tensor.nbytes)


@pytest.mark.cupy
def test_cupy_is_told_that_there_is_no_interface_for_bfloat16(make: MakeTensor, cupy: Any) -> None:
    tensor = make((4,), DType.BFLOAT16)
    with pytest.raises(ExportError, match="cuda:0"):
        cupy.asarray(tensor)


@pytest.mark.torch
@pytest.mark.cupy
def test_torch_and_cupy_see_the_same_memory(make: MakeTensor, torch: Any, cupy: Any) -> None:
    tensor = make((8,), DType.FLOAT16)
    torch.from_dlpack(tensor).copy_(torch.arange(8))
    torch.cuda.synchronize()
    assert cupy.asnumpy(cupy.from_dlpack(tensor)).tolist() == list(range(8))


def test_numpy_cannot_reach_it(make: MakeTensor) -> None:
    with pytest.raises(ExportError, match="cuda:0"):
        make((4,), DType.FLOAT32).numpy()


@pytest.mark.torch
def test_memory_goes_with_the_last_torch_view(make: MakeTensor, tracker: VramTracker, torch: Any) -> None:
    tensor = make((1024,), DType.FLOAT32)
    held = [torch.from_dlpack(tensor)]
    tensor.close()
    del tensor
    tracker.flush()
    assert tracker.total == 4096
    assert bytes(held[0].cpu().view(torch.uint8).tolist()) == content_of(4096)
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    tracker.flush()
    assert tracker.total == 0


@pytest.mark.cupy
def test_memory_goes_with_the_last_cupy_view(make: MakeTensor, tracker: VramTracker, cupy: Any) -> None:
    for take in (cupy.from_dlpack, cupy.asarray):
        tensor = make((1024,), DType.FLOAT32)
        theirs = take(tensor)
        tensor.close()
        del tensor
        tracker.flush()
        assert tracker.total == 4096
        assert cupy.asnumpy(theirs).tobytes() == content_of(4096)
        del theirs
        tracker.flush()
        assert tracker.total == 0


@pytest.mark.torch
def test_torch_tensors_are_filled(make: MakeTensor, device: Device, torch: Any) -> None:
    for dtype in DType:
        theirs = torch.zeros((3, 4), dtype=getattr(torch, dtype.value), device="cuda:0")
        target = borrow(theirs, tensor_name="a.weight")
        assert (target.address, target.shape, target.dtype) == (theirs.data_ptr(), (3, 4), dtype)
        check_target(target, (3, 4), dtype, device.info, "a.weight")
        device.barrier().synchronize()
        fill(device, target.memory, content_of(target.nbytes))
        assert bytes(theirs.cpu().flatten().view(torch.uint8).tolist()) == content_of(target.nbytes)
        assert torch.from_dlpack(make((3, 4), dtype, target)).data_ptr() == theirs.data_ptr()
    with pytest.raises(TargetError, match="require gradient"):
        borrow(torch.zeros(4, device="cuda:0", requires_grad=True), tensor_name="a.weight")


@pytest.mark.cupy
def test_cupy_arrays_are_filled(device: Device, cupy: Any) -> None:
    theirs = cupy.zeros((3, 4), cupy.float16)

    class OnlyInterface:
        __cuda_array_interface__ = theirs.__cuda_array_interface__

    for buffer in (theirs, OnlyInterface()):
        theirs.set(np.zeros((3, 4), np.float16))
        target = borrow(buffer, tensor_name="a.weight")
        assert (target.address, target.dtype) == (theirs.data.ptr, DType.FLOAT16)
        check_target(target, (3, 4), DType.FLOAT16, device.info, "a.weight")
        device.barrier().synchronize()
        fill(device, target.memory, content_of(24))
        assert cupy.asnumpy(theirs).tobytes() == content_of(24)
    with pytest.raises(TargetError, match="not C-contiguous"):
        borrow(theirs.T, tensor_name="a.weight")


SHUTDOWN = """
    import sys, threading, time
    import {library} as library
    from asyncload.device import open_device
    from asyncload.gguf import GGMLType
    from asyncload.memory import Purpose, VramTracker
    from asyncload.model import Tensor
    from asyncload.quant import DType

    device = open_device("cuda:0")
    device.attach()
    tracker = VramTracker(device)

    def tensor():
        memory = tracker.allocate(64, Purpose.WEIGHTS, "a")
        return Tensor("a", shape=(16,), logical_shape=(16,), dtype=DType.FLOAT32, type=GGMLType.F32, device=device.info,
                      memory=memory)

    views = [library.from_dlpack(tensor()), library.from_dlpack(tensor())[2:], tensor()]
    views.append(views)
    sys.held = views
    threading.Thread(target=lambda views: time.sleep(60), args=(views,), daemon=True).start()
"""


@pytest.mark.parametrize(
    "library", [pytest.param("torch", marks=pytest.mark.torch), pytest.param("cupy", marks=pytest.mark.cupy)]
)
def test_the_interpreter_ends_cleanly_with_device_views_alive(library: str) -> None:
    script = textwrap.dedent(SHUTDOWN).format(library=library)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
