"""A named tensor on a device, and the ways in which it gives itself to other libraries."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, Final

from asyncload.device import DeviceInfo
from asyncload.errors import ClosedError, ExportError, RangeError
from asyncload.gguf import GGMLType
from asyncload.model._dlpack import CPU, CUDA, Memory, export_capsule, typestr, view
from asyncload.quant import DType

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import CapsuleType

__all__ = ["Tensor"]


class Tensor:
    """A tensor whose data are complete in a device's memory.

    ``shape`` is row-major and in elements of ``dtype``; ``type`` is the ggml type that the file has; ``packed`` says
    that the blocks were left as they are: then ``dtype`` is uint8, the last dimension of ``shape`` counts bytes, and
    ``logical_shape`` is the shape of the weights in them.

    It gives itself by DLPack (``torch.from_dlpack``, ``cupy.from_dlpack``, ``numpy.from_dlpack``), by
    ``__cuda_array_interface__`` where device and dtype allow, and to numpy on the host. Nothing is copied, and every
    view keeps the memory alive, also after ``close``; the last one may be dropped on any thread.

    Its ``memory``, in which it starts at byte ``offset``, is any owner of memory. Raises ``RangeError`` if it does not
    fit in there.
    """

    __slots__ = (
        "__weakref__",
        "_lent",
        "_memory",
        "_offset",
        "device",
        "dtype",
        "logical_shape",
        "name",
        "nbytes",
        "shape",
        "type",
    )

    def __init__(
        self,
        name: str,
        *,
        shape: tuple[int, ...],
        logical_shape: tuple[int, ...],
        dtype: DType,
        type: GGMLType,  # noqa: A002 - the field's name
        device: DeviceInfo,
        memory: Memory,
        offset: int = 0,
    ) -> None:
        self.name: Final = name
        self.shape: Final = shape
        self.logical_shape: Final = logical_shape
        self.dtype: Final = dtype
        self.type: Final = type
        self.device: Final = device
        self.nbytes: Final = prod(shape) * dtype.itemsize
        if offset < 0 or offset + self.nbytes > memory.nbytes:
            raise RangeError(
                f"{name}: {self.nbytes} bytes at {offset} leave its memory of {memory.nbytes} bytes",
                offset=offset,
                nbytes=self.nbytes,
                limit=memory.nbytes,
            )
        self._memory: Memory | None = memory
        self._offset: Final = offset
        self._lent: Memory | None = None

    @property
    def packed(self) -> bool:
        """Whether these are the file's quantized blocks, as bytes."""
        return self.dtype is DType.UINT8  # which no type of ggml's is by itself

    @property
    def closed(self) -> bool:
        """Whether the tensor has let go of its memory."""
        return self._memory is None

    @property
    def memory(self) -> Memory:
        """The owner of the memory that the tensor lies in. Raises ``ClosedError`` when closed."""
        memory = self._memory
        if memory is None:
            raise ClosedError(f"{self.name} has been closed, by itself or with its model")
        return memory

    @property
    def address(self) -> int:
        """Where the data start, on the device; 0 for a tensor without any. Raises ``ClosedError`` when closed."""
        return self._address(self.memory)

    def numpy(self) -> NDArray[Any]:
        """The data as a writable numpy array that shares them; bfloat16 as ``ml_dtypes.bfloat16``.

        Raises ``ExportError`` for a tensor on another device than the host and where ``ml_dtypes`` is needed and not
        installed, ``ClosedError`` when closed.
        """
        if self.device.kind != "host":
            raise ExportError(
                f"{self.name} is on {self.device.name}, where numpy cannot reach it: use torch.from_dlpack or "
                "cupy.from_dlpack, or load it with device='host'",
                tensor=self.name,
            )
        array = self._view(self.memory)
        if self.dtype is not DType.BFLOAT16:
            return array
        try:
            import ml_dtypes
        except ImportError as error:
            raise ExportError(
                f"{self.name} is bfloat16, which numpy has only with the package ml_dtypes: pip install ml_dtypes",
                tensor=self.name,
            ) from error
        return array.view(ml_dtypes.bfloat16)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """What ``numpy.asarray`` asks for; raises as ``numpy`` does."""
        import numpy as np

        return np.array(self.numpy(), dtype=dtype, copy=copy)

    def __dlpack_device__(self) -> tuple[int, int]:
        """The device as DLPack writes it: type (1 for the host, 2 for CUDA) and number."""
        return (CPU, 0) if self.device.kind == "host" else (CUDA, self.device.index)

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> CapsuleType:
        """A DLPack capsule that shares the data and keeps their memory alive, by the Python array API standard.

        The data are complete before anyone has the tensor, so no ``stream`` has to wait; it is checked all the same.
        The capsule is versioned where ``max_version`` is 1.0 or later. ``copy=True`` copies on the host.

        Raises ``ExportError`` (a ``BufferError``) for a ``dl_device`` other than the tensor's, a copy on another device
        than the host, and a stream that does not exist on the device; ``ClosedError`` when closed.
        """
        device = self.__dlpack_device__()
        if dl_device is not None and tuple(dl_device) != device:
            raise ExportError(
                f"{self.name} is on DLPack device {device} and is not moved to {tuple(dl_device)}", tensor=self.name
            )
        if copy and self.device.kind != "host":
            raise ExportError(
                f"{self.name} is on {self.device.name} and gives no copies: take it with copy=None, then copy",
                tensor=self.name,
            )
        # On CUDA 0 is ambiguous and not allowed; without streams there is nothing but None, or -1: do not wait.
        if stream is not None and stream != -1 and (self.device.kind == "host" or stream <= 0):
            raise ExportError(f"{self.name} is on {self.device.name}, which has no stream {stream}", tensor=self.name)
        memory = self.memory
        return export_capsule(
            self._view(memory), self._address(memory), self.dtype, device, max_version, copy=bool(copy)
        )

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The CUDA array interface, version 3; not there (``AttributeError``) on the host and for bfloat16.

        Who uses it keeps the tensor, not its memory, so from the first time on the tensor itself keeps its memory
        until it is dropped, also when it is closed. Raises ``ClosedError`` when closed.
        """
        if self.device.kind != "cuda" or self.dtype is DType.BFLOAT16:
            raise AttributeError(f"a {self.dtype} tensor on {self.device.name} has no __cuda_array_interface__")
        self._lent = memory = self.memory
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": typestr(self.dtype),
            "data": (self._address(memory), False),
            "strides": None,
            "stream": None,
        }

    def close(self) -> None:
        """Lets go of the memory, which is freed when the last view of it is dropped; further calls do nothing."""
        self._memory = None

    def __repr__(self) -> str:
        state = ", closed" if self.closed else ""
        return (
            f"Tensor({self.name!r}, shape={self.shape}, dtype={self.dtype}, type={self.type.name}, "
            f"device={self.device.name!r}{state})"
        )

    def _address(self, memory: Memory) -> int:
        return memory.address + self._offset if self.nbytes else 0

    def _view(self, memory: Memory) -> NDArray[Any]:
        return view(memory, self._address(memory), self.shape, self.dtype)
