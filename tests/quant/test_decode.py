from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from asyncload.errors import RangeError, UnsupportedQuantError
from asyncload.gguf import GGMLType
from asyncload.quant import DType, can_decode, decode, kernel_address, native_dtype, prepare
from tests.quant import oracle

Bytes = npt.NDArray[np.uint8]
Decode = Callable[[GGMLType, DType, memoryview, memoryview], None]
KERNELS = [
    (type_, dtype)
    for type_ in GGMLType
    for dtype in DType
    if can_decode(type_, dtype) and native_dtype(type_) is not dtype
]
COPIES = [(type_, dtype) for type_ in GGMLType if (dtype := native_dtype(type_))]
PAIRS = [pytest.param(*pair, id=f"{pair[0].name}-{pair[1]}") for pair in KERNELS]
COPIED_PAIRS = [pytest.param(*pair, id=f"{pair[0].name}-{pair[1]}") for pair in COPIES]
# The address and the three arguments; ctypes lets go of the interpreter lock meanwhile.
C_FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


@pytest.fixture(scope="module", autouse=True)
def _prepared() -> None:
    prepare(KERNELS)  # all in one subprocess


def blocks(type_: GGMLType) -> Bytes:
    return oracle.blocks(type_).reshape(-1)


def decoded(type_: GGMLType, dtype: DType, source: Bytes) -> Bytes:
    target = np.empty(source.size // type_.type_size * type_.block_size * dtype.itemsize, np.uint8)
    decode(type_, dtype, source.data, target.data)
    return target


@pytest.mark.parametrize(("type_", "dtype"), oracle.parameters(KERNELS))
def test_every_bit_is_the_references(type_: GGMLType, dtype: DType) -> None:
    assert oracle.mistakes(type_, dtype, decoded(type_, dtype, blocks(type_))) == 0


@pytest.mark.parametrize(("type_", "dtype"), PAIRS)
@pytest.mark.parametrize("count", [1, 2, 5, 31, 32, 33, 100])
def test_any_number_of_blocks_anywhere_in_memory(type_: GGMLType, dtype: DType, count: int) -> None:
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
def test_pieces_are_the_whole(type_: GGMLType, dtype: DType) -> None:
    source = blocks(type_)[: 150 * type_.type_size]
    cuts = [source[begin * type_.type_size : end * type_.type_size] for begin, end in ((0, 1), (1, 66), (66, 150))]
    pieces = b"".join(decoded(type_, dtype, piece).tobytes() for piece in cuts)
    assert pieces == decoded(type_, dtype, source).tobytes()


@pytest.mark.parametrize(("type_", "dtype"), COPIED_PAIRS)
def test_what_is_there_already_is_copied(type_: GGMLType, dtype: DType) -> None:
    source = np.random.default_rng(0).integers(0, 256, 77 * type_.type_size, dtype=np.uint8)
    assert decoded(type_, dtype, source).tobytes() == source.tobytes()


def test_bytes_and_views_of_other_formats_are_sources_too() -> None:
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
    with pytest.raises(UnsupportedQuantError, match=f"{type_.name} cannot be decoded to {dtype}"):
        kernel_address(type_, dtype)


@pytest.mark.parametrize("name", ["Q8_1", "Q8_K"])
def test_the_types_of_activations_are_refused_as_such(name: str) -> None:
    message = f"{name} cannot be decoded to bfloat16: .* activations"
    with pytest.raises(UnsupportedQuantError, match=message):
        decode(GGMLType[name], DType.BFLOAT16, memoryview(b""), memoryview(bytearray()))
    with pytest.raises(UnsupportedQuantError, match=message):
        prepare([(GGMLType[name], DType.BFLOAT16)])


@pytest.mark.parametrize(
    ("type_", "dtype"), [(GGMLType.Q1_0, DType.FLOAT32), (GGMLType.F32, DType.FLOAT16)], ids=["Q1_0", "F32"]
)
def test_beyond_four_gigabytes(type_: GGMLType, dtype: DType) -> None:
    """Source or target passes 2^32 bytes: what is written last is right, and is written last.

    Both repeat a little memory, at lengths that do not divide 2^32, so that no place is taken for one 2^32 before it.
    """
    count = (1 << 32) // max(type_.type_size, type_.block_size * dtype.itemsize) + 50_000
    step = type_.block_size * dtype.itemsize
    with repeated(count * type_.type_size, 3 << 20) as source, repeated(count * step, 5 << 20) as target:
        source[: 3 << 20] = np.random.default_rng(0).integers(0, 128, 3 << 20, dtype=np.uint8)
        decode(type_, dtype, source.data, target.data)
        last = 20_000  # blocks
        wanted = decoded(type_, dtype, source[-last * type_.type_size :].copy())
        assert (target[-wanted.size :] == wanted)[-(4 << 20) :].all()


@contextmanager
def repeated(nbytes: int, period: int) -> Generator[Bytes]:
    """An array of any size that takes ``period`` bytes of memory, which it shows again and again."""
    libc: Any = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    whole, fixed = -(-nbytes // period) * period, 0x10
    file = os.memfd_create("repeated")
    try:
        os.ftruncate(file, period)
        base = libc.mmap(None, whole, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        access = mmap.PROT_READ | mmap.PROT_WRITE
        for at in range(base, base + whole, period):
            assert libc.mmap(at, period, access, mmap.MAP_SHARED | fixed, file, 0) == at
    finally:
        os.close(file)
    try:
        yield np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(base))
    finally:
        assert libc.munmap(base, whole) == 0


def decode_by_address(type_: GGMLType, dtype: DType, source: memoryview, target: memoryview) -> None:
    addresses = [np.frombuffer(view, np.uint8).ctypes.data if view.nbytes else 0 for view in (source, target)]
    assert C_FUNCTION(kernel_address(type_, dtype))(*addresses, source.nbytes // type_.type_size) == 1


@pytest.mark.parametrize(("type_", "dtype"), PAIRS + COPIED_PAIRS)
def test_the_c_function_does_what_decode_does(type_: GGMLType, dtype: DType) -> None:
    source = np.random.default_rng(type_).integers(0, 256, 101 * type_.type_size + 1, dtype=np.uint8)[1:]
    for count in (0, 1, 5, 31, 32, 33, 101):
        some = source[: count * type_.type_size]
        wanted = some if native_dtype(type_) is dtype else decoded(type_, dtype, some)
        target = np.full(wanted.size + 65, 0xA5, np.uint8)
        decode_by_address(type_, dtype, some.data, target[1:-64].data)
        assert target[1:-64].tobytes() == wanted.tobytes()
        assert target[0] == 0xA5
        assert (target[-64:] == 0xA5).all()


def test_a_c_function_stays_where_it_is() -> None:
    addresses = {pair: kernel_address(*pair) for pair in KERNELS + COPIES}
    assert len(set(addresses.values())) == len(addresses)
    assert {pair: kernel_address(*pair) for pair in addresses} == addresses


def test_many_threads_are_in_a_c_function_at_once() -> None:
    source = blocks(GGMLType.Q4_K)
    wanted = decoded(GGMLType.Q4_K, DType.BFLOAT16, source)
    targets = [np.empty_like(wanted) for _ in range(32)]
    with ThreadPoolExecutor(8) as pool:
        calls = [
            pool.submit(decode_by_address, GGMLType.Q4_K, DType.BFLOAT16, source.data, target.data)
            for target in targets
        ]
    assert not any(call.exception() for call in calls)
    assert all(target.tobytes() == wanted.tobytes() for target in targets)


@pytest.mark.parametrize("decode", [decode, decode_by_address])
def test_the_interpreter_runs_while_a_kernel_does(decode: Decode) -> None:
    """A target seen half written is only possible if this thread ran while the kernel did.

    The switch interval keeps the interpreter from taking turns by itself.
    """
    source = np.zeros(34 << 16, np.uint8)
    target = np.empty(4 * 32 << 16, np.uint8)
    decode(GGMLType.Q8_0, DType.FLOAT32, source.data, target.data)  # a first call imports, which lets others run too
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        assert any(_seen_half_written(decode, source, target) for _ in range(1000))
    finally:
        sys.setswitchinterval(interval)


def _seen_half_written(decode: Decode, source: Bytes, target: Bytes) -> bool:
    target.fill(0xFF)
    arguments = (GGMLType.Q8_0, DType.FLOAT32, source.data, target.data)
    thread = threading.Thread(target=decode, args=arguments)
    thread.start()
    seen = False
    while not seen and target[-1] == 0xFF:
        seen = target[0] != 0xFF and target[-1] == 0xFF
    thread.join()
    return seen
