"""The demo: fetches a real model, loads it packed and as bfloat16, and checks values against gguf-py."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from asyncload import Loader, Model, Progress, Tensor, read_header
from asyncload.cli.progress import ProgressBar
from asyncload.cli.summary import summarize
from asyncload.cli.text import table
from asyncload.device import Device, DeviceMemory
from asyncload.errors import AsyncloadError
from asyncload.quant import DType
from bench._common import run_async
from bench._demo_model import DemoError, fetch

_SAMPLE = 3  # tensors of each type: the first, one in the middle, the last


def download(device: Device, tensor: Tensor) -> bytes:
    """A tensor's bytes, from whatever device it is on; blocks."""
    device.attach()
    data = bytearray(tensor.nbytes)
    device.download(DeviceMemory(tensor.address, tensor.nbytes), 0, memoryview(data))
    return bytes(data)


def expected(reference: Any, tensor: Tensor) -> bytes:
    """The same tensor's bytes by gguf-py: its blocks, or its values rounded to bfloat16."""
    import gguf
    import ml_dtypes

    if tensor.packed or tensor.dtype is DType.FLOAT32:
        data: bytes = reference.data.tobytes()
        return data
    return gguf.dequantize(reference.data, reference.tensor_type).astype(ml_dtypes.bfloat16).tobytes()


def sample(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Some tensors of every type."""
    by_type: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        by_type.setdefault(tensor.type.name, []).append(tensor)
    chosen: list[Tensor] = []
    for group in by_type.values():
        step = max(1, (len(group) - 1) // (_SAMPLE - 1))
        chosen += group[::step][:_SAMPLE]
    return chosen


def check(device: Device, model: Model, references: dict[str, Any]) -> None:
    """Compares a sample of the tensors with gguf-py, byte for byte; raises ``DemoError`` where they differ; blocks."""
    rows = [("type", "dtype", "tensor", "weights", "against gguf-py")]
    different = 0
    for tensor in sample(model.values()):
        same = download(device, tensor) == expected(references[tensor.name], tensor)
        different += not same
        weights = f"{model.header.tensors[tensor.name].n_weights:,}"
        rows.append((tensor.type.name, tensor.dtype, tensor.name, weights, "same" if same else "DIFFERENT"))
    print(table(rows, align="<<<><"))
    if different:
        raise DemoError(f"{different} of {len(rows) - 1} tensors differ from gguf-py's")


def read_with_gguf_py(file: Path) -> dict[str, Any]:
    """gguf-py's tensors by name; blocks for some ten seconds."""
    import gguf

    begin = time.perf_counter()
    tensors = {str(tensor.name): tensor for tensor in gguf.GGUFReader(file).tensors}
    print(f"gguf-py took {time.perf_counter() - begin:.1f} s to read the same header")
    return tensors


async def show(file: Path, device: str | None) -> None:
    """Reads the header, loads the model twice, and checks what came."""
    begin = time.perf_counter()
    header = await read_header(file)
    print(f"header: {len(header.tensors)} tensors, {len(header.metadata)} keys in {time.perf_counter() - begin:.3f} s")
    references = await anyio.to_thread.run_sync(read_with_gguf_py, file)
    async with Loader(device) as loader:
        for dtype in ("packed", "bf16"):
            print(f"\n--- {dtype} ---")
            await loader.load(file, dtype=dtype, select=[0])  # compiles, where it is the first time on this machine
            model = await _load_with_progress(loader, file, dtype)
            with model:
                print(f"{summarize(str(file), model).render()}\n")
                await anyio.to_thread.run_sync(check, loader.device, model, references)


async def _load_with_progress(loader: Loader, file: Path, dtype: str) -> Model:
    if not sys.stderr.isatty():
        return await loader.load(file, dtype=dtype, progress=_Quarters())
    bar = ProgressBar(sys.stderr)
    try:
        return await loader.load(file, dtype=dtype, progress=bar)
    finally:
        bar.close()


class _Quarters:
    """Progress for a log: a line for each quarter."""

    def __init__(self) -> None:
        self._next = 0

    def __call__(self, progress: Progress) -> None:
        if 4 * progress.fraction >= self._next:
            self._next = int(4 * progress.fraction) + 1
            print(f"{progress.fraction:4.0%} after {progress.elapsed:.3f} s, {progress.rate / 1e9:.2f} GB/s")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", metavar="NAME", help="host or cuda:N (default: the first GPU, else host)")
    parser.add_argument("--file", metavar="FILE", type=Path, help="another model than the demo's")
    arguments = parser.parse_args(argv)
    try:
        run_async(partial(show, arguments.file or fetch(), arguments.device))
    except (AsyncloadError, DemoError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
