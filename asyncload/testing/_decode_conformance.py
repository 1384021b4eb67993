"""What every device's streams decode, as tests; part of ``DeviceConformance``."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asyncload.device import DeviceMemory
from asyncload.errors import DeviceError, PlanError, RangeError, UnsupportedQuantError
from asyncload.gguf import GGMLType
from asyncload.quant import DType, can_decode, decode, native_dtype, prepare
from asyncload.testing._blocks import random_blocks

if TYPE_CHECKING:
    from asyncload.testing._device_conformance import Rig

__all__ = ["DecodeConformance"]

_FLOATS = (DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16)
_PAIRS = [
    pytest.param(type_, dtype, id=f"{type_.name}-{dtype}")
    for type_ in GGMLType
    for dtype in _FLOATS
    if can_decode(type_, dtype) and native_dtype(type_) is not dtype
]
_Q8_0 = (GGMLType.Q8_0, DType.BFLOAT16)
_GUARD = 0xEE
_BLOCKS = 333
_ROUNDS = 24


@cache
def _prepare_host() -> None:
    prepare([pair.values for pair in _PAIRS])  # type: ignore[misc]  # all in one subprocess


def _decoded(type_: GGMLType, dtype: DType, packed: bytes) -> bytes:
    """What the host's kernels make of blocks."""
    _prepare_host()
    target = bytearray(len(packed) // type_.type_size * type_.block_size * dtype.itemsize)
    decode(type_, dtype, memoryview(packed), memoryview(target))
    return bytes(target)


class DecodeConformance:
    """The contract of ``Stream.decode`` and ``Device.prepare`` as tests.

    Values are compared with the host's kernels, which have tests of their own.
    """

    def hold(self, device: Any, stream: Any) -> AbstractContextManager[Any]:
        """As ``DeviceConformance`` has it."""
        raise NotImplementedError

    @pytest.mark.parametrize(("type_", "dtype"), _PAIRS)
    def test_blocks_are_decoded_behind_their_copy(self, rig: Rig, type_: GGMLType, dtype: DType) -> None:
        packed = random_blocks(type_, _BLOCKS, seed=1).tobytes()
        wanted = _decoded(type_, dtype, packed)
        scratch, memory = rig.allocate(len(packed) + 64), rig.allocate(len(wanted) + 512)
        rig.device.prepare([(type_, dtype)])
        rig.stream.upload(memory, 0, rig.stage(bytes([_GUARD]) * memory.nbytes), 0, memory.nbytes)
        source = scratch.part(2 if type_.quantized else 4, len(packed))
        rig.stream.upload(source, 0, rig.stage(packed), 0, len(packed))
        rig.stream.decode(type_, dtype, source, memory.part(256, len(wanted)))
        rig.stream.record().synchronize()
        found = rig.read(memory)
        bits = f"u{dtype.itemsize}"
        assert np.array_equal(np.frombuffer(found[256:-256], bits), np.frombuffer(wanted, bits))
        assert set(found[:256]) | set(found[-256:]) == {_GUARD}

    def test_a_scratch_is_filled_again_behind_the_kernel_that_reads_it(self, rig: Rig) -> None:
        packed = [random_blocks(GGMLType.Q8_0, 1000, seed=seed).tobytes() for seed in range(_ROUNDS)]
        size = 1000 * 64
        scratch, memory = rig.allocate(len(packed[0])), rig.allocate(_ROUNDS * size)
        rig.device.prepare([_Q8_0])
        stages = [rig.stage(blocks) for blocks in packed]
        with self.hold(rig.device, rig.stream):
            for number, staging in enumerate(stages):
                rig.stream.upload(scratch, 0, staging, 0, scratch.nbytes)
                rig.stream.decode(*_Q8_0, scratch, memory.part(number * size, size))
            event = rig.stream.record()
            assert not event.done()
        event.synchronize()
        assert rig.read(memory) == b"".join(_decoded(*_Q8_0, blocks) for blocks in packed)

    def test_no_blocks_are_no_work(self, rig: Rig) -> None:
        rig.device.prepare([_Q8_0])
        rig.device.prepare([])
        rig.stream.decode(*_Q8_0, DeviceMemory(0, 0), DeviceMemory(0, 0))
        rig.stream.record().synchronize()

    @pytest.mark.parametrize(("source", "target"), [(34, 63), (34, 65), (34, 128), (33, 64), (68, 64), (0, 64)])
    def test_sizes_must_match(self, rig: Rig, source: int, target: int) -> None:
        rig.device.prepare([_Q8_0])
        memory = rig.allocate(1024)
        with pytest.raises(RangeError) as caught:
            rig.stream.decode(*_Q8_0, memory.part(512, source), memory.part(0, target))
        assert caught.value.limit == target

    @pytest.mark.parametrize("offset", [1, 2, 8, 15])
    def test_targets_that_stores_are_not_aligned_to_are_refused(self, rig: Rig, offset: int) -> None:
        rig.device.prepare([_Q8_0])
        memory = rig.allocate(1024)
        with pytest.raises(PlanError):
            rig.stream.decode(*_Q8_0, memory.part(512, 34), memory.part(offset, 64))

    def test_what_was_not_prepared_is_refused(self, rig: Rig) -> None:
        memory = rig.allocate(1024)
        with pytest.raises(DeviceError, match="prepared"):
            rig.stream.decode(GGMLType.Q5_1, DType.FLOAT16, memory.part(512, 24), memory.part(0, 64))

    @pytest.mark.parametrize("pair", [(GGMLType.Q8_K, DType.FLOAT32), (GGMLType.I8, DType.FLOAT16)])
    def test_what_has_no_kernel_cannot_be_prepared(self, rig: Rig, pair: tuple[GGMLType, DType]) -> None:
        with pytest.raises(UnsupportedQuantError) as caught:
            rig.device.prepare([_Q8_0, pair])
        assert (caught.value.type, caught.value.dtype) == (pair[0].name, str(pair[1]))

    def test_a_closed_stream_decodes_nothing(self, rig: Rig) -> None:
        rig.device.prepare([_Q8_0])
        memory = rig.allocate(1024)
        rig.stream.close()
        with pytest.raises(DeviceError, match="closed"):
            rig.stream.decode(*_Q8_0, memory.part(512, 34), memory.part(0, 64))

    def test_parts_stay_inside(self, rig: Rig) -> None:
        memory = rig.allocate(64)
        assert memory.part(16, 48) == DeviceMemory(memory.address + 16, 48)
        for offset, nbytes in ((-1, 4), (0, 65), (64, 1), (0, -1)):
            with pytest.raises(RangeError):
                memory.part(offset, nbytes)
