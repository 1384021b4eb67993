"""A load as a value: tensors, dtypes, bytes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from asyncload.errors import OptionsError, RangeError, UnsupportedQuantError
from asyncload.gguf import Header, TensorInfo
from asyncload.plan._chunks import Chunk, cut_chunks
from asyncload.plan._select import Selection, match_names, select_tensors
from asyncload.quant import DType, can_decode, native_dtype

__all__ = ["PACKED", "DtypeSpec", "LoadPlan", "TensorPlan", "plan_load"]

PACKED = "packed"
DtypeSpec = str | Mapping[str, str]
_DECODED = (DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16)


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What becomes of one tensor: its ``dtype`` and row-major ``shape`` on the device, and whether it is decoded.

    A quantized tensor that stays packed is uint8; its last dimension counts bytes then.
    """

    info: TensorInfo
    dtype: DType
    shape: tuple[int, ...]
    decoded: bool
    nbytes: int

    @property
    def block_nbytes(self) -> int:
        """Bytes that one block of the tensor's type takes once decoded."""
        return self.info.type.block_size * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """The tensors of a load in file order, and the sums that matter, in bytes."""

    tensors: tuple[TensorPlan, ...]
    chunk_size: int

    @property
    def device_nbytes(self) -> int:
        """Bytes that the tensors take on the device."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def chunks(self, skip: Collection[int] = ()) -> Iterator[Chunk]:
        """The pieces of work in file order, without the tensors whose indices are to be skipped."""
        return cut_chunks(self.tensors, self.chunk_size, skip)

    def check_sources(self, sizes: Sequence[int]) -> None:
        """Raises ``RangeError`` unless every tensor lies inside its file; ``sizes`` in bytes, by part."""
        for tensor in self.tensors:
            info = tensor.info
            if info.offset + info.nbytes > sizes[info.part]:
                raise RangeError(
                    f"{info.name}: {info.nbytes} bytes at {info.offset} leave the file of {sizes[info.part]} bytes",
                    offset=info.offset,
                    nbytes=info.nbytes,
                    limit=sizes[info.part],
                )


def plan_load(
    header: Header, *, dtype: DtypeSpec = PACKED, select: Selection = None, chunk_size: int = 16 << 20
) -> LoadPlan:
    """Plans the load of a model, or of the selected part of it.

    ``dtype`` is ``"packed"`` (blocks as they are), ``"float32"``, ``"float16"``, ``"bfloat16"`` or a short form of
    these, or a mapping from names or globs to them, of which the first that matches counts and what none matches stays
    packed. Integer tensors keep their type. ``chunk_size`` in bytes.

    Raises ``OptionsError`` for an unknown dtype, ``TensorNotFoundError`` for a name or pattern without a tensor,
    ``UnsupportedQuantError`` for a type that cannot be decoded.
    """
    wanted = _wanted_dtypes(header, dtype)
    tensors = sorted(select_tensors(header, select), key=lambda info: (info.part, info.offset))
    return LoadPlan(tuple(_plan_tensor(info, wanted[info.name]) for info in tensors), chunk_size)


def _wanted_dtypes(header: Header, spec: DtypeSpec) -> dict[str, DType | None]:
    """Each tensor's dtype as it was asked for; None for packed."""
    if not isinstance(spec, Mapping):
        return dict.fromkeys(header.tensors, _parse(spec))
    wanted: dict[str, DType | None] = {}
    for pattern, text in spec.items():
        parsed = _parse(text)
        for name in match_names(header.tensors, pattern):
            wanted.setdefault(name, parsed)
    return {name: wanted.get(name) for name in header.tensors}


def _parse(text: object) -> DType | None:
    if text == PACKED:
        return None
    if not isinstance(text, str):
        raise OptionsError(f"a dtype is named by a string such as 'bfloat16', not {text!r}", option="dtype")
    dtype = DType.parse(text)
    if dtype not in _DECODED:
        raise OptionsError(
            f"tensors can be loaded packed or as float32, float16 or bfloat16, not {text}", option="dtype"
        )
    return dtype


def _plan_tensor(info: TensorInfo, dtype: DType | None) -> TensorPlan:
    native = native_dtype(info.type)
    if native is not None and (dtype is None or dtype == native or info.type.integer):
        return TensorPlan(info, native, info.shape, decoded=False, nbytes=info.nbytes)
    if dtype is None:
        row = info.shape[-1] // info.type.block_size * info.type.type_size
        return TensorPlan(info, DType.UINT8, (*info.shape[:-1], row), decoded=False, nbytes=info.nbytes)
    if not can_decode(info.type, dtype):
        raise UnsupportedQuantError(
            f"{info.name}: {info.type.name} cannot be decoded to {dtype}; dtype='packed' loads its blocks as they are",
            tensor=info.name,
            type=info.type.name,
            dtype=str(dtype),
        )
    return TensorPlan(info, dtype, info.shape, decoded=True, nbytes=info.n_weights * dtype.itemsize)
