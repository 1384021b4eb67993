from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import libgguf
import numpy as np
import numpy.typing as npt
import pytest

from asyncload.errors import RangeError, UnsupportedQuantError
from asyncload.gguf import GGMLType
from asyncload.quant import DType, can_decode, decode, native_dtype, prepare

Bytes = npt.NDArray[np.uint8]
PAIRS = [
    pytest.param(type_, dtype, id=f"{type_.name}-{dtype}")
    for type_ in GGMLType
    for dtype in DType
    if can_decode(type_, dtype) and native_dtype(type_) is not dtype
]
QUANTIZED = [type_ for type_ in GGMLType if type_.quantized and can_decode(type_, DType.FLOAT32)]


@pytest.fixture(scope="module", autouse=True)
def _prepared() -> None:
    prepare([pair.values for pair in PAIRS])  # type: ignore[misc]  # all in one subprocess


def decoded(type_: GGMLType, dtype: DType, source: Bytes) -> Bytes:
    target = np.empty(source.size // type_.type_size * type_.block_size * dtype.itemsize, np.uint8)
    decode(type_, dtype, source.data, target.data)
    return target


@pytest.mark.parametrize(("type_", "dtype"), PAIRS)
def test_every_bit_is_the_references(
    type_: GGMLType,
    dtype: DType,
    blocks: Callable[[GGMLType], Bytes],
    mistakes: Callable[[GGMLType, DType, Bytes], int],
) -> None:
    assert mistakes(type_, dtype, decoded(type_, dtype, blocks(type_))) == 0


@pytest.mark.parametrize("type_", QUANTIZED, ids=lambda type_: type_.name)
def test_another_reference_says_the_same(
    type_: GGMLType, blocks: Callable[[GGMLType], Bytes], mistakes: Callable[[GGMLType, DType, Bytes], int]
) -> None:
    rows = blocks(type_).reshape(-1, type_.type_size)
    values: npt.NDArray[np.float32] = libgguf.dequantize_rows(rows, int(type_), type_.block_size)
    assert mistakes(type_, DType.FLOAT32, np.ascontiguousarray(values).reshape(-1).view(np.uint8)) == 0


@pytest.mark.parametrize(("type_", "dtype"), PAIRS)
@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 100])
def test_any_number_of_blocks_anywhere_in_memory(
    type_: GGMLType, dtype: DType, count: int, blocks: Callable[[GGMLType], Bytes]
) -> None:
    source = blocks(type_)[: count * type_.type_size]
    wanted = decoded(type_, dtype, source)
    for shift in (1, 3, 7):
        shifted = np.empty(source.size + shift, np.uint8)
        shifted[shift:] = source
        target = np.full(wanted.size + shift + 64, 0xA5, np.uint8)
        decode(type_, dtype, shifted.data[shift:], target.data[shift:-64])
        assert target[shift:-64].tobytes() == wanted.tobytes()
        assert (target[:shift] == 0xA5).all()
        assert (target[-64:] == 0xA5).all()


@pytest.mark.parametrize(("type_", "dtype"), PAIRS)
def test_pieces_are_the_whole(type_: GGMLType, dtype: DType, blocks: Callable[[GGMLType], Bytes]) -> None:
    source = blocks(type_)[: 150 * type_.type_size]
    cuts = [source[begin * type_.type_size : end * type_.type_size] for begin, end in ((0, 1), (1, 66), (66, 150))]
    pieces = b"".join(decoded(type_, dtype, piece).tobytes() for piece in cuts)
    assert pieces == decoded(type_, dtype, source).tobytes()


@pytest.mark.parametrize("type_", [type_ for type_ in GGMLType if native_dtype(type_)], ids=lambda type_: type_.name)
def test_what_is_there_already_is_copied(type_: GGMLType) -> None:
    dtype = native_dtype(type_)
    assert dtype is not None
    source = np.random.default_rng(0).integers(0, 256, 77 * type_.type_size, dtype=np.uint8)
    assert decoded(type_, dtype, source).tobytes() == source.tobytes()


def test_bytes_and_views_of_other_formats_are_sources_too(blocks: Callable[[GGMLType], Bytes]) -> None:
    source = blocks(GGMLType.Q8_0)[: 34 * 20]
    wanted = decoded(GGMLType.Q8_0, DType.FLOAT16, source).tobytes()
    for view in (memoryview(source.tobytes()), source.view(np.uint16).data):
        target = np.empty(20 * 32, np.float16)
        decode(GGMLType.Q8_0, DType.FLOAT16, view, target.data)
        assert target.tobytes() == wanted


def test_no_blocks_are_no_work() -> None:
    decode(GGMLType.Q4_K, DType.FLOAT32, memoryview(b""), memoryview(bytearray()))


@pytest.mark.parametrize(
    ("source_nbytes", "target_nbytes", "needed", "limit"),
    [
        (143, 512, 144, 143),
        (145, 512, 288, 145),
        (144, 511, 512, 511),
        (144, 513, 512, 513),
        (288, 512, 1024, 512),
        (0, 2, 0, 2),
    ],
)
def test_sizes_must_match(source_nbytes: int, target_nbytes: int, needed: int, limit: int) -> None:
    target = bytearray(b"\xa5" * target_nbytes)
    with pytest.raises(RangeError) as caught:
        decode(GGMLType.Q4_K, DType.BFLOAT16, memoryview(bytes(source_nbytes)), memoryview(target))
    assert (caught.value.offset, caught.value.nbytes, caught.value.limit) == (0, needed, limit)
    assert target == b"\xa5" * target_nbytes


def test_a_target_that_cannot_be_written_is_refused() -> None:
    target = bytes(128)
    with pytest.raises(TypeError, match="read-only"):
        decode(GGMLType.Q8_0, DType.FLOAT32, memoryview(b"\x01" * 34), memoryview(target))
    assert target == bytes(128)


def test_views_with_gaps_are_refused() -> None:
    with pytest.raises(BufferError, match="contiguous"):
        decode(GGMLType.Q8_0, DType.FLOAT32, memoryview(bytes(68))[::2], memoryview(bytearray(128)))
    with pytest.raises(BufferError, match="contiguous"):
        decode(GGMLType.Q8_0, DType.FLOAT32, memoryview(bytes(34)), memoryview(bytearray(256))[::2])


@pytest.mark.parametrize(
    ("type_", "dtype"), [(GGMLType.Q8_K, DType.FLOAT32), (GGMLType.I8, DType.FLOAT16), (GGMLType.Q4_K, DType.UINT8)]
)
def test_pairs_outside_the_table_are_refused(type_: GGMLType, dtype: DType) -> None:
    with pytest.raises(UnsupportedQuantError) as caught:
        decode(type_, dtype, memoryview(b""), memoryview(bytearray()))
    assert (caught.value.type, caught.value.dtype) == (type_.name, str(dtype))


def test_the_interpreter_runs_while_a_kernel_does() -> None:
    """A target seen half written is only possible if this thread ran while the kernel did.

    The switch interval keeps the interpreter from taking turns by itself.
    """
    source = np.zeros(34 << 16, np.uint8)
    target = np.empty(4 * 32 << 16, np.uint8)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        assert any(_seen_half_written(source, target) for _ in range(1000))
    finally:
        sys.setswitchinterval(interval)


def _seen_half_written(source: Bytes, target: Bytes) -> bool:
    target.fill(0xFF)
    arguments = (GGMLType.Q8_0, DType.FLOAT32, source.data, target.data)
    thread = threading.Thread(target=decode, args=arguments)
    thread.start()
    seen = False
    while not seen and target[-1] == 0xFF:
        seen = target[0] != 0xFF and target[-1] == 0xFF
    thread.join()
    return seen
