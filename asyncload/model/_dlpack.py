"""DLPack with numpy's help: capsules out, capsules in, and no native code of ours.

A capsule's deleter may be called on any thread, without the interpreter lock, and after the interpreter has ended, so
it cannot be Python. numpy's own is written for all of that. So a tensor is shown to numpy as an array over its address,
which numpy never reads, and the capsule that numpy makes of it is corrected before anyone sees it: its device, and its
dtype where numpy lacks that (bfloat16). What the deleter drops is the array, and with it the owner of the memory.

Structures and codes: ``dlpack.h`` of DLPack 1.0.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any, Final, Protocol

from asyncload.quant import DType

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import CapsuleType

__all__ = [
    "CPU",
    "CUDA",
    "CUDA_HOST",
    "CUDA_MANAGED",
    "IS_COPIED",
    "READ_ONLY",
    "DLDataType",
    "DLTensor",
    "Memory",
    "dtype_of",
    "export_capsule",
    "open_capsule",
    "typestr",
    "view",
]

# DLDeviceType
CPU: Final = 1
CUDA: Final = 2
CUDA_HOST: Final = 3
CUDA_MANAGED: Final = 13

# flags of a versioned capsule
READ_ONLY: Final = 1
IS_COPIED: Final = 2

# A dtype's name without its bits: DLDataTypeCode, and the kind that numpy stores it as.
_KINDS: Final = {"int": (0, "i"), "uint": (1, "u"), "float": (2, "f"), "bfloat": (4, "u")}


class Memory(Protocol):
    """What a tensor lies in: ``nbytes`` at ``address``, there for as long as the object is."""

    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


class DLDevice(ctypes.Structure):
    """The device's type and number."""

    device_type: int
    device_id: int
    _fields_ = (("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


class DLDataType(ctypes.Structure):
    """The dtype: its code, the bits of one lane, and the lanes of one element."""

    code: int
    bits: int
    lanes: int
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class DLTensor(ctypes.Structure):
    """A view of memory; strides count elements, and are NULL at will where the view is contiguous."""

    data: int | None
    device: DLDevice
    ndim: int
    dtype: DLDataType
    shape: Sequence[int]
    strides: Sequence[int] | None
    byte_offset: int
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class DLManagedTensor(ctypes.Structure):
    """What a capsule named ``dltensor`` holds."""

    dl_tensor: DLTensor
    _fields_ = (("dl_tensor", DLTensor), ("manager_ctx", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class DLManagedTensorVersioned(ctypes.Structure):
    """What a capsule named ``dltensor_versioned`` holds."""

    major: int
    flags: int
    dl_tensor: DLTensor
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("dl_tensor", DLTensor),
    )


# Prototypes of our own: `ctypes.pythonapi`'s function objects are shared by the whole process.
_capsule_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class _Base:
    """What numpy keeps as the base of an array: the description of the memory, and its owner."""

    __slots__ = ("__array_interface__", "memory")

    def __init__(self, memory: Memory, interface: dict[str, Any]) -> None:
        self.memory = memory
        self.__array_interface__ = interface


def typestr(dtype: DType) -> str:
    """A dtype as the array interfaces write it; bfloat16, which they lack, as unsigned integers of its size."""
    return f"<{_kind(dtype)[1]}{dtype.itemsize}"


def dtype_of(data_type: DLDataType) -> DType | None:
    """The dtype that a DLPack dtype is, or None where there is none."""
    for dtype in DType:
        if (data_type.code, data_type.bits, data_type.lanes) == (_kind(dtype)[0], dtype.itemsize * 8, 1):
            return dtype
    return None


def view(memory: Memory, address: int, shape: tuple[int, ...], dtype: DType) -> NDArray[Any]:
    """A writable array over an address, which is not read and may be a device's; it keeps ``memory`` alive.

    bfloat16 appears as uint16.
    """
    import numpy as np

    # Strides that are left out become 0 in an empty array, with which torch cannot do all that it does with its own.
    lengths = [max(length, 1) for length in shape]
    interface = {
        "version": 3,
        "shape": shape,
        "strides": tuple(prod(lengths[axis + 1 :]) * dtype.itemsize for axis in range(len(shape))),
        "typestr": typestr(dtype),
        "data": (address, False),
    }
    return np.asarray(_Base(memory, interface))


def export_capsule(
    array: np.ndarray[Any, Any],
    address: int,
    dtype: DType,
    device: tuple[int, int],
    max_version: tuple[int, int] | None,
    *,
    copy: bool,
) -> CapsuleType:
    """Makes the capsule for ``view(memory, address, shape, dtype)``; ``device`` is its DLPack type and number.

    It is versioned where the consumer's ``max_version`` is 1.0 or later. ``copy`` copies in host memory.
    """
    capsule = array.__dlpack__(max_version=max_version, copy=True if copy else None)
    tensor, _ = open_capsule(capsule)
    tensor.dtype.code = _kind(dtype)[0]
    tensor.device.device_type, tensor.device.device_id = device
    if not copy:
        tensor.data = address or None  # numpy gives an empty array an address of its own
    return capsule


def open_capsule(capsule: CapsuleType) -> tuple[DLTensor, int]:
    """What lies in a capsule that nobody has consumed, and its flags (0 in one without a version).

    The structure is the capsule's own and lives as long as the capsule. Raises ``BufferError`` for anything else, and
    for a major version other than 1.
    """
    if _capsule_is_valid(capsule, b"dltensor_versioned"):
        versioned = DLManagedTensorVersioned.from_address(_capsule_pointer(capsule, b"dltensor_versioned"))
        if versioned.major != 1:
            raise BufferError(f"DLPack version {versioned.major} is not known")
        return versioned.dl_tensor, versioned.flags
    if _capsule_is_valid(capsule, b"dltensor"):
        return DLManagedTensor.from_address(_capsule_pointer(capsule, b"dltensor")).dl_tensor, 0
    raise BufferError("no DLPack capsule, or one that has been consumed")


def _kind(dtype: DType) -> tuple[int, str]:
    return _KINDS[dtype.value.rstrip("0123456789")]
