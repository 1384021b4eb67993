"""The caller's own buffers, as the target of a load: whose they are, where they lie, whether they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any, Final, Literal

from asyncload.device import DeviceInfo, DeviceMemory
from asyncload.errors import TargetError
from asyncload.model._dlpack import (
    CPU,
    CUDA,
    CUDA_HOST,
    CUDA_MANAGED,
    IS_COPIED,
    READ_ONLY,
    dtype_of,
    open_capsule,
)
from asyncload.quant import DType

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Target", "borrow", "check_disjoint", "check_target"]

_PLACES: Final[dict[int, Literal["cuda", "host"]]] = {
    CPU: "host",
    CUDA: "cuda",
    CUDA_HOST: "host",
    CUDA_MANAGED: "cuda",
}


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Target:
    """A writable, C-contiguous buffer of the caller's: ``nbytes`` at ``address``, kept alive by ``owner``.

    ``dtype`` is None where asyncload has none such; ``kind`` and ``index`` name the device, and ``index`` is None where
    the buffer does not tell it.
    """

    address: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: DType | None
    kind: Literal["cuda", "host"]
    index: int | None
    owner: object = field(repr=False)

    @property
    def memory(self) -> DeviceMemory:
        """The range that the device fills."""
        return DeviceMemory(self.address, self.nbytes)

    @property
    def device(self) -> str:
        """The device's name, as far as the buffer tells it."""
        return self.kind if self.kind == "host" or self.index is None else f"{self.kind}:{self.index}"


def borrow(buffer: object, *, tensor_name: str) -> Target:
    """Takes hold of a caller's buffer by DLPack, ``__cuda_array_interface__`` or the buffer protocol.

    Nothing is copied or moved, and nothing is waited for: who fills a device buffer first waits for the work that was
    enqueued on the device before (``Device.barrier``). It may enter the driver, and some libraries give a buffer only
    to a thread whose current device is the buffer's, so this belongs on a thread that is attached to the device.

    Raises ``TargetError`` for what is no such buffer, read-only, not C-contiguous, misaligned or on a device of
    another make.
    """
    try:
        target = _describe(buffer)
    except Exception as error:
        # whatever another library raises is mapped here, at the edge
        raise TargetError(
            f"{tensor_name}: the {type(buffer).__name__} given for it cannot be filled: {error}", tensor=tensor_name
        ) from error
    if target.dtype is not None and target.address % target.dtype.itemsize:
        raise TargetError(
            f"{tensor_name}: the buffer given for it starts at {target.address:#x}, no multiple of the "
            f"{target.dtype.itemsize} bytes of a {target.dtype}",
            tensor=tensor_name,
        )
    return target


def check_target(target: Target, shape: tuple[int, ...], dtype: DType, device: DeviceInfo, name: str) -> None:
    """Raises ``TargetError`` unless the buffer can take the tensor as it will be: device, dtype, shape.

    For uint8, the dtype of packed blocks, any buffer of signed or unsigned bytes of exactly that size will do,
    whatever its shape.
    """
    needed = prod(shape) * dtype.itemsize
    same_device = target.kind == device.kind and target.index in {None, device.index}
    if dtype is DType.UINT8:
        fits = target.dtype in {DType.UINT8, DType.INT8} and target.nbytes == needed
    else:
        fits = target.dtype is dtype and target.shape == shape
    if same_device and fits:
        return
    raise TargetError(
        f"{name}: the tensor is {dtype} {list(shape)} on {device.name}, {needed} bytes; the buffer given for it is "
        f"{target.dtype or 'of another dtype'} {list(target.shape)} on {target.device}, {target.nbytes} bytes",
        tensor=name,
        needed=needed,
        available=target.nbytes,
    )


def check_disjoint(targets: Mapping[str, Target]) -> None:
    """Raises ``TargetError`` if two tensors' buffers overlap; ``targets`` by the tensors' names."""
    ranges = sorted(
        (target.kind, target.address, target.nbytes, name) for name, target in targets.items() if target.nbytes
    )
    for (kind, address, nbytes, name), (next_kind, next_address, _, next_name) in pairwise(ranges):
        if kind == next_kind and next_address < address + nbytes:
            raise TargetError(f"{name} and {next_name}: the buffers given for them overlap", tensor=next_name)


def _describe(buffer: Any) -> Target:
    """One of three ways in; host arrays go by numpy, as its DLPack knows neither bfloat16 nor why it refuses."""
    import numpy as np

    if hasattr(buffer, "__dlpack__") and not issubclass(type(buffer), np.ndarray):
        return _from_dlpack(buffer)
    interface = getattr(buffer, "__cuda_array_interface__", None)
    if interface is not None:
        return _from_cuda_array(buffer, interface)
    array: NDArray[Any] = np.asarray(buffer, copy=False)
    if not array.flags.writeable:
        raise BufferError("it is read-only")
    if not array.flags.c_contiguous:
        raise BufferError("it is not C-contiguous")
    return Target(
        array.__array_interface__["data"][0], array.nbytes, array.shape, _numpy_dtype(array.dtype), "host", 0, array
    )


def _from_dlpack(buffer: Any) -> Target:
    device_type = int(buffer.__dlpack_device__()[0])
    if device_type not in _PLACES:
        raise BufferError(f"it lies on a device of DLPack type {device_type}")
    # no synchronization: that is the loader's, with all work on the device
    stream = {"stream": -1} if _PLACES[device_type] == "cuda" else {}
    try:
        capsule = buffer.__dlpack__(max_version=(1, 0), copy=False, **stream)
    except TypeError:  # an exporter from before DLPack 1.0
        capsule = buffer.__dlpack__(**stream)
    tensor, flags = open_capsule(capsule)
    if flags & READ_ONLY:
        raise BufferError("it is read-only")
    if flags & IS_COPIED:
        raise BufferError("its DLPack export is a copy")
    shape = tuple(tensor.shape[: tensor.ndim])
    if tensor.strides and not _is_contiguous(shape, tensor.strides[: tensor.ndim]):
        raise BufferError("it is not C-contiguous")
    bits = tensor.dtype.bits * tensor.dtype.lanes
    kind = _PLACES[device_type]
    # the host is one place, and managed memory moves from device to device
    index = {CUDA: tensor.device.device_id, CUDA_MANAGED: None}.get(device_type, 0)
    return Target(
        (tensor.data or 0) + tensor.byte_offset,
        prod(shape) * bits // 8,
        shape,
        dtype_of(tensor.dtype),
        kind,
        index,
        capsule,  # not consumed: when it goes, the exporter's memory does
    )


def _from_cuda_array(buffer: Any, interface: Mapping[str, Any]) -> Target:
    import numpy as np

    address, read_only = interface["data"]
    shape, dtype, strides = tuple(interface["shape"]), np.dtype(interface["typestr"]), interface.get("strides")
    if read_only:
        raise BufferError("it is read-only")
    if interface.get("mask") is not None:
        raise BufferError("it is masked")
    if strides is not None and not _is_contiguous(shape, strides, dtype.itemsize):
        raise BufferError("it is not C-contiguous")
    return Target(address, prod(shape) * dtype.itemsize, shape, _numpy_dtype(dtype), "cuda", None, buffer)


def _numpy_dtype(dtype: Any) -> DType | None:
    return next((member for member in DType if dtype.isnative and dtype.name == member), None)


def _is_contiguous(shape: Sequence[int], strides: Sequence[int], itemsize: int = 1) -> bool:
    """Whether strides are those of row-major order; those of dimensions of one element mean nothing."""
    if 0 in shape:
        return True
    expected = itemsize
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length > 1 and stride != expected:
            return False
        expected *= length
    return True
