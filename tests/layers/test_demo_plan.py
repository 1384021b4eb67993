"""The plan of the demo's real model against its header, and against what streaming it allocates."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from asyncload import blocking
from asyncload.device import HostDevice
from asyncload.options import Options
from asyncload.plan import Mode, kv_cache, plan_memory
from bench._demo_model import NAME, cache_folder

pytestmark = pytest.mark.demo

WIDTH, VOCABULARY = 640, 262_144
GLOBAL = (5, 11, 17)  # layers that look at everything; the others look 512 tokens back


def test_what_the_header_says() -> None:
    header = blocking.read_header(cache_folder() / NAME)
    plan = plan_memory(header, free=8 << 30, context=32_768, batch=256, dtype="bf16")
    assert (plan.mode, list(plan.layers)) == ("full", list(range(18)))
    # the embedding is the output head, too, and is there once
    assert {tensor.info.name for tensor in plan.always.tensors} == {"token_embd.weight", "output_norm.weight"}
    assert plan.always.device_nbytes == 2 * (VOCABULARY * WIDTH + WIDTH)
    assert sum(tensor.info.nbytes for tensor, _ in plan.tensors) == header.nbytes
    a_token = 2 * 256 * 2  # one head for keys and values
    tokens = len(GLOBAL) * 32_768 + (18 - len(GLOBAL)) * (512 + 256)
    assert (plan.breakdown["kv_cache"], plan.kv_exact) == (tokens * a_token, True)
    assert kv_cache(header, context=500, kv_type="f16", batch=256).nbytes == 18 * 500 * a_token


class PeakDevice(HostDevice):
    """Knows the most that was allocated at a time."""

    def __init__(self) -> None:
        super().__init__(on_allocate=self._count)
        self.peak = 0

    def _count(self, nbytes: int) -> None:
        memory = self.memory()
        self.peak = max(self.peak, memory.total - memory.free + nbytes)


@pytest.mark.parametrize("mode", ["full", "hybrid", "stream"])
@pytest.mark.parametrize("dtype", ["packed", "bf16"])
@pytest.mark.parametrize("host", ["slabs", "file"])
def test_streaming_takes_what_the_plan_says(mode: Mode, dtype: str, host: Literal["slabs", "file"]) -> None:
    device, free = PeakDevice(), 8 << 30
    arguments: dict[str, Any] = {"dtype": dtype, "workspace": 0, "kv_bytes": 0, "margin": 0}
    options = Options(decode="device", chunk_size=1 << 20)
    if mode == "hybrid":  # where about half of the layers fit
        header = blocking.read_header(cache_folder() / NAME)
        modes: tuple[Mode, ...] = ("stream", "full")
        least, most = (
            plan_memory(header, free=free, device="host", options=options, allow=[name], **arguments).total
            for name in modes
        )
        free = (least + most) // 2
    with (
        blocking.Loader(device, options=options) as loader,
        loader.stream(cache_folder() / NAME, free=free, allow=[mode], host=host, **arguments) as layers,
    ):
        plan = layers.plan
        assert plan.mode == mode
        assert sorted((*plan.resident, *plan.streamed)) == list(range(18))
        assert len(plan.resident) in {"full": {18}, "hybrid": set(range(5, 13)), "stream": {0}}[mode]
        for layer in layers:
            with layer.on():
                pass
    # every tensor is a multiple of what a slot aligns to, so the sums are the same, and not only a bound
    assert device.peak == plan.total
    assert plan.breakdown["scratch"] == (options.suited_to("host").scratch if dtype == "bf16" else 0)
