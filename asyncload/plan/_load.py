"""A load as a value: tensors, dtypes, bytes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from asyncload.errors import OptionsError, RangeError, TargetError, UnsupportedQuantError
from asyncload.gguf import GGMLType, Header, TensorInfo
from asyncload.options import DecodeOption, DeviceKind
from asyncload.plan._chunks import Chunk, cut_chunks
from asyncload.plan._select import Selection, match_names, select_tensors
from asyncload.plan._tensor import Decode, TensorPlan
from asyncload.quant import DType, can_decode, native_dtype, refusal
from asyncload.quant.cuda import ALIGNMENT

__all__ = ["PACKED", "DtypeSpec", "LoadPlan", "all_kernels", "plan_load"]

PACKED = "packed"
DtypeSpec = str | Mapping[str, str]
Pair = tuple[GGMLType, DType]
_DECODED = (DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16)


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """The tensors of a load in file order, and the sums that matter, in bytes."""

    tensors: tuple[TensorPlan, ...]
    chunk_size: int

    @property
    def device_nbytes(self) -> int:
        """Bytes that the tensors take on the device."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def upload_nbytes(self) -> int:
        """Bytes that cross the bus."""
        return sum(tensor.upload_nbytes for tensor in self.tensors)

    def kernels(self, decode: Decode) -> set[Pair]:
        """The pairs of type and dtype that are decoded at one of the places."""
        return {(tensor.info.type, tensor.dtype) for tensor in self.tensors if tensor.decode is decode}

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
    header: Header,
    *,
    dtype: DtypeSpec = PACKED,
    select: Selection = None,
    chunk_size: int = 16 << 20,
    decode: DecodeOption = "auto",
    device: DeviceKind = "host",
    unaligned: Collection[str] = (),
) -> LoadPlan:
    """Plans the load of a model, or of the selected part of it.

    ``dtype`` is ``"packed"`` (blocks as they are), ``"float32"``, ``"float16"``, ``"bfloat16"`` or a short form of
    these, or a mapping from names or globs to them, of which the first that matches counts and what none matches stays
    packed. Integer tensors keep their type. ``chunk_size`` in bytes.

    ``decode`` says where: on the ``"device"``, on the ``"host"``, or, with ``"auto"``, behind the bus where there is
    one and the device has a kernel for the pair, so that the packed bytes cross it. ``device`` is the device's kind.
    ``unaligned`` names tensors whose target the device's kernels cannot write to.

    Raises ``OptionsError`` for an unknown dtype, ``TensorNotFoundError`` for a name or pattern without a tensor,
    ``UnsupportedQuantError`` for a type that cannot be decoded, there or at all, ``TargetError`` for an unaligned
    target where decoding on the device was asked for.
    """
    wanted = _wanted_dtypes(header, dtype)
    tensors = sorted(select_tensors(header, select), key=lambda info: (info.part, info.offset))

    def place(info: TensorInfo, dtype: DType) -> Decode:
        return _place(info, dtype, decode, device, aligned=info.name not in unaligned)

    return LoadPlan(tuple(_plan_tensor(info, wanted[info.name], place) for info in tensors), chunk_size)


def all_kernels(dtypes: Iterable[str], *, decode: DecodeOption, device: DeviceKind) -> dict[Decode, set[Pair]]:
    """The pairs of type and dtype that loads with these settings may decode, by place, to targets that are aligned.

    Raises ``OptionsError`` for a dtype that nothing is decoded to.
    """
    parsed = [_parse_decoded(text) for text in dtypes]
    pairs = {pair for pair in product(GGMLType, parsed) if can_decode(*pair) and native_dtype(pair[0]) is not pair[1]}
    place = Decode.DEVICE if _on_device(decode, device) else Decode.HOST
    return {Decode.DEVICE: set(), Decode.HOST: set(), place: pairs}


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
    return None if text == PACKED else _parse_decoded(text)


def _parse_decoded(text: object) -> DType:
    if not isinstance(text, str):
        raise OptionsError(f"a dtype is named by a string such as 'bfloat16', not {text!r}", option="dtype")
    dtype = DType.parse(text)
    if dtype not in _DECODED:
        raise OptionsError(
            f"tensors can be loaded packed or as float32, float16 or bfloat16, not {text}", option="dtype"
        )
    return dtype


def _place(info: TensorInfo, dtype: DType, option: DecodeOption, device: DeviceKind, *, aligned: bool) -> Decode:
    """Where a tensor is decoded to a dtype; raises where that cannot be done."""
    if not can_decode(info.type, dtype):
        raise UnsupportedQuantError(
            f"{info.name}: {refusal(info.type, dtype)}; dtype='packed' loads its blocks as they are",
            tensor=info.name,
            type=info.type.name,
            dtype=str(dtype),
        )
    if not _on_device(option, device):
        return Decode.HOST
    if not aligned and option == "device":
        raise TargetError(
            f"{info.name}: the device decodes into buffers aligned to {ALIGNMENT} bytes; decode='auto' takes any",
            tensor=info.name,
        )
    return Decode.DEVICE if aligned else Decode.HOST


def _on_device(option: DecodeOption, device: DeviceKind) -> bool:
    """Whether the device decodes what it can, as far as that is a setting's matter."""
    return option == "device" or (option, device) == ("auto", "cuda")


def _plan_tensor(info: TensorInfo, dtype: DType | None, place: Callable[[TensorInfo, DType], Decode]) -> TensorPlan:
    native = native_dtype(info.type)
    if native is not None and (dtype is None or dtype == native or info.type.integer):
        return TensorPlan(info, native, info.shape, Decode.NONE, info.nbytes)
    if dtype is None:
        row = info.shape[-1] // info.type.block_size * info.type.type_size
        return TensorPlan(info, DType.UINT8, (*info.shape[:-1], row), Decode.NONE, info.nbytes)
    return TensorPlan(info, dtype, info.shape, place(info, dtype), info.n_weights * dtype.itemsize)
