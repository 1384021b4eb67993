"""What a load does with one tensor."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from asyncload.gguf import TensorInfo
from asyncload.quant import DType

__all__ = ["Decode", "TensorPlan"]


class Decode(StrEnum):
    """Where a tensor's blocks become numbers: on the device, behind the bus; on the host, before it; or nowhere."""

    DEVICE = "device"
    HOST = "host"
    NONE = "none"


class TensorPlan(NamedTuple):
    """What becomes of one tensor: its ``dtype`` and row-major ``shape`` on the device, and where it is decoded.

    A quantized tensor that stays packed is uint8; its last dimension counts bytes then.
    """

    info: TensorInfo
    dtype: DType
    shape: tuple[int, ...]
    decode: Decode
    nbytes: int

    @property
    def upload_nbytes(self) -> int:
        """Bytes that cross the bus: decoded ones where the host decodes, else those of the file."""
        return self.nbytes if self.decode is Decode.HOST else self.info.nbytes

    @property
    def block_nbytes(self) -> int:
        """Bytes that one block of the tensor's type takes once decoded."""
        return self.info.type.block_size * self.dtype.itemsize
