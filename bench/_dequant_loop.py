"""What an event loop notices while two threads decode."""

from __future__ import annotations

from functools import partial
from typing import Final

import anyio
import numpy as np
from anyio import to_thread

from asyncload.gguf import GGMLType
from asyncload.quant import DType, decode, prepare
from bench._common import run_async
from bench._dequant_peers import Bytes, make_blocks
from bench.latency import lateness, percentiles

__all__ = ["LATE_GOAL", "measure_lateness"]

LATE_GOAL: Final = 4.0  # milliseconds at p99

_TYPE, _DTYPE = GGMLType.Q4_K, DType.BFLOAT16
_PIECE: Final = 4 << 20  # bytes of output: what a load decodes at a time
_GIGABYTE: Final = 1 << 30
_THREADS: Final = 2


def measure_lateness(target: Bytes, ticks: int) -> dict[str, float]:
    """Percentiles of a 1 ms ticker's lateness, in milliseconds, while gigabytes of weights are written to a buffer."""
    piece = min(_PIECE, target.nbytes // _THREADS)
    source = np.resize(make_blocks(_TYPE), _TYPE.nbytes(piece // _DTYPE.itemsize))
    pieces = [target[at : at + piece] for at in range(0, target.nbytes, piece)]
    prepare([(_TYPE, _DTYPE)])

    async def decode_share(first: int) -> None:
        share = pieces[first::_THREADS]
        for _ in range(max(1, _GIGABYTE // target.nbytes) if len(pieces) > _THREADS else 1):
            for out in share:
                await to_thread.run_sync(partial(decode, _TYPE, _DTYPE, source.data, out.data))

    async def decode_all() -> None:
        async with anyio.create_task_group() as group:
            for first in range(_THREADS):
                group.start_soon(decode_share, first)

    async def measure() -> list[float]:
        await decode_all()
        return await lateness(decode_all, ticks)

    return percentiles(run_async(measure))
