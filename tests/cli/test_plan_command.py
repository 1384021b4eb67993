from __future__ import annotations

import json
from pathlib import Path

import pytest

from asyncload.cli import main
from asyncload.options import Options

DECODED = 4 * 2048 + 64
PACKED = 4352 + 128


def plan(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["plan", *map(str, arguments)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_every_tensor_has_its_place_and_its_bytes(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(plan(capsys, small_model, "--device", "cuda:0", "--dtype", "bf16", "--json"))
    assert (found["device"], found["decode"]) == ("cuda:0", "auto")
    scratch = found["bytes"].pop("scratch")
    assert scratch == Options().suited_to("cuda").scratch
    assert found["bytes"] == {"file": PACKED, "bus": PACKED, "device": DECODED}
    assert found["tensors"][0] == {
        "name": "blk.0.attn_q.weight",
        "type": "Q8_0",
        "dtype": "bfloat16",
        "shape": [32, 32],
        "decode": "device",
        "bytes": {"file": 1088, "bus": 1088, "device": 2048},
    }


def test_decoding_before_the_bus_makes_it_carry_more(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in (("--device", "cuda", "--decode", "host"), ("--device", "host")):
        found = json.loads(plan(capsys, small_model, "--dtype", "bf16", "--json", *more))
        assert {tensor["decode"] for tensor in found["tensors"]} == {"host"}
        assert found["bytes"] == {"file": PACKED, "bus": DECODED, "device": DECODED, "scratch": 0}


def test_the_environment_chooses_too(
    small_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASYNCLOAD_DECODE", "device")
    found = json.loads(plan(capsys, small_model, "--device", "host", "--dtype", "bf16", "--json"))
    assert {tensor["decode"] for tensor in found["tensors"]} == {"device"}


def test_text_says_the_same(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = plan(capsys, small_model, "--device", "cuda", "--dtype", "bf16", "--dtype", "blk.1.*=packed")
    lines = [line.split() for line in out.splitlines()]
    assert ["Q8_0", "bfloat16", "device", "2", "2,176", "2,176", "4,096"] in lines
    assert ["Q8_0", "uint8", "none", "2", "2,176", "2,176", "2,176"] in lines
    assert ["blk.1.attn_k.weight", "Q8_0", "uint8", "none", "1,088", "1,088", "1,088"] in lines
    assert ["output_norm.weight", "F32", "bfloat16", "device", "128", "128", "64"] in lines


def test_selected_tensors_only(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(plan(capsys, small_model, "--device", "host", "--select", "1", "--json"))
    assert [tensor["name"] for tensor in found["tensors"]] == ["blk.1.attn_q.weight", "blk.1.attn_k.weight"]


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "cuda:-1", "host:3"])
@pytest.mark.parametrize("more", [[], ["--free", "1GiB"]])
def test_a_device_that_nobody_knows(
    small_model: Path, capsys: pytest.CaptureFixture[str], name: str, more: list[str]
) -> None:
    assert main(["plan", str(small_model), f"--device={name}", *more]) == 1
    assert f"no device is called '{name}'" in capsys.readouterr().err
