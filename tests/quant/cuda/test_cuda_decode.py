"""The CUDA kernels on a device."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from asyncload.gguf import GGMLType
from asyncload.quant import FAMILIES, DType
from asyncload.quant.cuda import can_decode, prepare
from tests.quant import oracle

pytestmark = pytest.mark.gpu

Bytes = npt.NDArray[np.uint8]

PAIRS = [
    (type_, dtype)
    for type_ in FAMILIES
    for dtype in (DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16)
    if can_decode(type_, dtype)
]
GUARD = 256
POISON = 0xA5


class Gpu:
    """The first device: its memory, by addresses, one stream, and all kernels."""

    def __init__(self) -> None:
        self.driver: Any = import_module("cuda.bindings.driver")
        core: Any = import_module("cuda.core")
        self.device = core.Device(0)
        self.device.set_current()
        self.stream = self.device.create_stream()
        self.kernels = prepare(f"sm_{self.device.arch}", PAIRS)

    def check(self, result: tuple[Any, ...]) -> Any:
        code, *values = result
        assert int(code) == 0, code
        return values[0] if values else None

    def allocate(self, nbytes: int) -> int:
        return int(self.check(self.driver.cuMemAlloc(nbytes)))

    def free(self, address: int) -> None:
        self.check(self.driver.cuMemFree(address))

    def write(self, address: int, data: Bytes) -> None:
        data = np.ascontiguousarray(data)
        self.check(self.driver.cuMemcpyHtoD(address, data.ctypes.data, data.nbytes))

    def read(self, address: int, nbytes: int) -> Bytes:
        data = np.empty(nbytes, np.uint8)
        self.check(self.driver.cuMemcpyDtoH(data.ctypes.data, address, nbytes))
        return data

    def fill(self, address: int, nbytes: int) -> None:
        self.check(self.driver.cuMemsetD8(address, POISON, nbytes))

    def repeat(self, address: int, written: int, nbytes: int) -> None:
        """Fills memory with copies of the first bytes that are written there."""
        while written < nbytes:
            piece = min(written, nbytes - written)
            self.check(self.driver.cuMemcpyDtoD(address + written, address, piece))
            written += piece

    def run(self, type_: GGMLType, dtype: DType, source: int, target: int, count: int) -> None:
        self.check(self.driver.cuCtxSynchronize())  # the copies above are not on this stream
        self.kernels[type_, dtype].launch(self.stream, source, target, count)
        self.stream.sync()

    def decode(self, type_: GGMLType, dtype: DType, blocks: Bytes, *, shift: int = 0, target_shift: int = 0) -> Bytes:
        """Decodes blocks that lie ``shift`` bytes after an aligned address; nothing else may be written."""
        nbytes = len(blocks) * type_.block_size * dtype.itemsize
        room = -(-(blocks.size + shift) // 4) * 4
        whole = GUARD + nbytes + target_shift + GUARD
        source, target = self.allocate(room), self.allocate(whole)
        try:
            self.fill(source, room)  # the words around the ends of the blocks are read whole
            self.fill(target, whole)
            self.write(source + shift, blocks)
            self.run(type_, dtype, source + shift, target + GUARD + target_shift, len(blocks))
            got = self.read(target, whole)
        finally:
            self.free(source)
            self.free(target)
        begin = GUARD + target_shift
        assert (got[:begin] == POISON).all()
        assert (got[begin + nbytes :] == POISON).all()
        return got[begin : begin + nbytes]


@pytest.fixture(scope="module")
def gpu() -> Iterator[Gpu]:
    gpu = Gpu()
    yield gpu
    gpu.stream.close()


def test_every_bit_is_the_references(type_: GGMLType, dtype: DType, gpu: Gpu) -> None:
    for shift in (0, 1, 2, 4, 8):
        assert oracle.mistakes(type_, dtype, gpu.decode(type_, dtype, oracle.blocks(type_), shift=shift)) == 0


def test_any_number_of_blocks_from_any_block_on(type_: GGMLType, dtype: DType, gpu: Gpu) -> None:
    for number, count in enumerate((1, 2, 3, 7, 31, 33, 1000)):
        shift, target_shift = number * type_.type_size, 0 if type_.quantized else number * dtype.itemsize
        got = gpu.decode(type_, dtype, oracle.blocks(type_)[:count], shift=shift, target_shift=target_shift)
        assert oracle.mistakes(type_, dtype, got) == 0


def test_no_blocks_are_no_work(gpu: Gpu) -> None:
    gpu.run(GGMLType.Q4_K, DType.BFLOAT16, 0, 0, 0)


def test_targets_that_stores_cannot_be_aligned_to_are_refused(gpu: Gpu) -> None:
    with pytest.raises(ValueError, match="16"):
        gpu.kernels[GGMLType.Q4_K, DType.BFLOAT16].launch(gpu.stream, 0, 8, 1)
    with pytest.raises(ValueError, match="2"):
        gpu.kernels[GGMLType.F32, DType.BFLOAT16].launch(gpu.stream, 0, 7, 1)


def test_what_float16_cannot_hold_is_infinite(gpu: Gpu) -> None:
    block = np.full((1, 34), 127, np.uint8)
    block[0, :2] = np.array([65504], np.float16).view(np.uint8)
    block[0, 2:4] = (1, 0x81)  # once, and -127 times
    got = gpu.decode(GGMLType.Q8_0, DType.FLOAT16, block).view(np.float16)
    assert got[:3].tolist() == [65504, -np.inf, np.inf]


def test_every_stream_by_the_protocol_will_do(gpu: Gpu) -> None:
    from asyncload.device import open_device

    some = oracle.blocks(GGMLType.Q8_0)[:100]
    device = open_device("cuda")
    stream: Any = device.stream()
    memory = device.allocate(1 << 20)
    try:
        gpu.write(memory.address, some)
        kernel = gpu.kernels[GGMLType.Q8_0, DType.BFLOAT16]
        kernel.launch(stream, memory.address, memory.address + (1 << 19), 100)
        stream.record().synchronize()
        got = gpu.read(memory.address + (1 << 19), 100 * 64)
    finally:
        stream.close()
        device.free(memory)
        device.close()
    assert got.tobytes() == gpu.decode(GGMLType.Q8_0, DType.BFLOAT16, some).tobytes()


@pytest.mark.parametrize("type_name", ["Q8_0", "BF16"])
def test_beyond_four_gigabytes(type_name: str, gpu: Gpu) -> None:
    """Source, target and weights pass 2^32: blocks at these places, and the last ones, are right."""
    big = GGMLType[type_name]
    to = DType.FLOAT32 if big is GGMLType.BF16 else DType.BFLOAT16
    random = np.random.default_rng(0)
    period = 4099 * (32 // big.block_size)  # blocks; 4099 is a prime, so no power of two meets itself
    pattern = random.integers(0, 256, (period, big.type_size), dtype=np.uint8)
    wanted = gpu.decode(big, to, pattern)
    count = (1 << 32) // big.block_size + 5000
    source_nbytes, block_nbytes = count * big.type_size, big.block_size * to.itemsize
    source, target = gpu.allocate(source_nbytes), gpu.allocate(count * block_nbytes + GUARD)
    try:
        gpu.write(source, pattern)
        gpu.repeat(source, pattern.size, source_nbytes)
        gpu.fill(target, count * block_nbytes + GUARD)
        gpu.run(big, to, source, target, count)
        places = ((1 << 32) // big.type_size, (1 << 32) // block_nbytes, (1 << 32) // big.block_size, count)
        for place in places:
            first, last = place - 2000, min(place + 2000, count)
            got = gpu.read(target + first * block_nbytes, (last - first) * block_nbytes).reshape(-1, block_nbytes)
            indices = np.arange(first, last) % period
            assert (got == wanted.reshape(-1, block_nbytes)[indices]).all()
        assert (gpu.read(target + count * block_nbytes, GUARD) == POISON).all()
    finally:
        gpu.free(source)
        gpu.free(target)
