"""The layer streaming of this engine on the host device: every byte, over a slow bus and slow work, and cancelled."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from asyncload import blocking
from asyncload.device import HostDevice
from asyncload.gguf import GGMLType
from asyncload.loader import Loader
from asyncload.options import EngineOption
from asyncload.testing import LayerConformance, LayerRig, Wait, differences, host_rig, write_layers
from asyncload.threads import run_in_thread
from tests.layers.models import SMALL, open_stream, sweep


class TestHostLayers(LayerConformance):
    engine: EngineOption = "python"

    def rig(self, *, lost: Wait | None = None) -> AbstractAsyncContextManager[LayerRig]:
        return host_rig(replace(SMALL, decode="device", engine=self.engine), lost=lost)

    def in_use(self, loader: Loader) -> Sequence[object]:
        return [*super().in_use(loader), loader._active().idle]


@pytest.mark.native
class TestNativeHostLayers(TestHostLayers):
    engine = "native"


@pytest.mark.native
@pytest.mark.anyio
async def test_a_layer_wakes_the_event_loop_once(tmp_path: Path) -> None:
    layers, passes, wakes = 24, 3, 0
    content = await run_in_thread(partial(write_layers, tmp_path / "model.gguf", layers))
    nbytes = sum(map(len, content.values()))
    async with host_rig(replace(SMALL, engine="native")) as rig:
        arguments: dict[str, Any] = {"allow": ["stream"], "host": "slabs", "slots": 3, "workspace": 0, "kv_bytes": 0}
        async with rig.loader.stream(tmp_path / "model.gguf", **arguments) as stream:
            feed: Any = stream._active()._feed
            hear = feed.hear

            def counted() -> None:
                nonlocal wakes
                wakes += 1
                hear()

            feed.hear = counted
            rig.slow_bus(0.001)
            consumer = await rig.consumer(nbytes, seconds=0.001, poison=False)
            for _ in range(passes):
                async for layer in stream:
                    consumer.use(layer)
                await run_in_thread(consumer.take)
    ahead = 3  # of the next pass
    assert passes * layers / 4 < wakes <= passes * (layers + 1) + ahead  # one more at the end of each pass


@pytest.mark.native
@pytest.mark.anyio
async def test_no_python_runs_for_a_chunk_of_a_layer_from_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, made = tmp_path / "model.gguf", list[object]()
    await run_in_thread(partial(write_layers, path, 4, rows=512))

    def from_native(_: HostDevice, event: object) -> None:
        made.append(event)

    monkeypatch.setattr(HostDevice, "from_native", from_native)
    async with (
        Loader("host", options=replace(SMALL, engine="native")) as loader,
        open_stream(loader, path, dtype="packed", host="file") as stream,
    ):
        async for layer in stream:
            with layer.on():
                assert len(layer) > 0
        assert made == []
        last = stream._active().scheduler.last
        assert last is not None
        chunks = sum(len(copies) for use in last.uses for copies in use.fed.copies())
    assert chunks > 4 * len(last.uses)
    assert len(made) == 2 * chunks  # now that they were asked for


@pytest.mark.native
@pytest.mark.anyio
@pytest.mark.parametrize("host", ["slabs", "file"])
async def test_the_log_says_how_layers_were_read(tmp_path: Path, caplog: pytest.LogCaptureFixture, host: str) -> None:
    path = tmp_path / "model.gguf"
    await run_in_thread(partial(write_layers, path, 4))
    async with Loader("host", options=replace(SMALL, engine="native")) as loader:
        with caplog.at_level("DEBUG", "asyncload.load"):
            async with open_stream(loader, path, host=host) as layers:
                await sweep(layers)
    said = [record.getMessage() for record in caplog.records]
    assert said.count(f"{path}: pread: too small to measure") >= (5 if host == "file" else 2)  # and what stays


def test_differences_are_told_by_tensor() -> None:
    assert differences({"a": b"1"}, {"a": b"1"}) == []
    found = {"a": b"1234", "b": b"12", "c": b"1\xa5\xa54", "d": b""}
    assert differences(found, {"a": b"1234", "b": b"1", "c": b"1231", "e": b""}) == [
        "d: not expected",
        "b: 2 bytes, not 1",
        "c: 3 of 4 bytes wrong, from 1 on, 2 of them poison",
        "e: not found",
    ]


@pytest.mark.parametrize("uneven", [False, True])
def test_a_written_model_is_what_was_returned(tmp_path: Path, *, uneven: bool) -> None:
    def load(dtype: str) -> dict[str, bytes]:
        model = blocking.load(tmp_path / "model.gguf", device="host", dtype=dtype)
        return {name: tensor.numpy().tobytes() for name, tensor in model.items()}

    for type_, dtype in ((GGMLType.Q8_0, "packed"), (GGMLType.Q4_K, "bf16"), (GGMLType.F32, "f32")):
        content = write_layers(tmp_path / "model.gguf", 5, uneven=uneven, type=type_, dtype=dtype)
        assert load(dtype) == content
        sizes = [len(content[f"blk.{layer}.attn_q.weight"]) for layer in range(5)]
        assert len(set(sizes)) == (5 if uneven else 1)
