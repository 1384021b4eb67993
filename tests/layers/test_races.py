"""The layer streaming of this engine on the host device: every byte, over a slow bus and slow work, and cancelled."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from asyncload import blocking
from asyncload.gguf import GGMLType
from asyncload.loader import Loader
from asyncload.options import EngineOption
from asyncload.testing import LayerConformance, LayerRig, Wait, differences, host_rig, write_layers
from tests.layers.models import SMALL


class TestHostLayers(LayerConformance):
    engine: EngineOption = "python"

    def rig(self, *, lost: Wait | None = None) -> AbstractAsyncContextManager[LayerRig]:
        return host_rig(replace(SMALL, decode="device", engine=self.engine), lost=lost)

    def in_use(self, loader: Loader) -> Sequence[object]:
        return [*super().in_use(loader), loader._active().idle]


@pytest.mark.native
class TestNativeHostLayers(TestHostLayers):
    engine = "native"


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
