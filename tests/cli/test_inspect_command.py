from __future__ import annotations

import json
from pathlib import Path

import pytest

from asyncload.cli import main


def inspect(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["inspect", *map(str, arguments)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_types_are_counted_and_weighed(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = lines(inspect(capsys, small_model))
    assert ["Q8_0", "4", "4,096", "4,352", "97.1%", "8.50"] in out
    assert ["F32", "1", "32", "128", "2.9%", "32.00"] in out


def test_layers_are_listed_with_what_is_outside(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = lines(inspect(capsys, small_model))
    assert ["0", "2", "2,176", "Q8_0"] in out
    assert ["1", "2", "2,176", "Q8_0"] in out
    assert ["other", "1", "128"] in out


def test_tensors_and_metadata_come_when_asked_for(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = inspect(capsys, small_model)
    assert "blk.0.attn_q.weight" not in short
    assert "tokenizer" not in short
    long = inspect(capsys, small_model, "--tensors", "--metadata")
    assert ["blk.0.attn_q.weight", "Q8_0", "32", "x", "32", "1,088"] in [line[:6] for line in lines(long)]
    assert "general.architecture = 'llama'" in long
    assert "'token 7', ...] (100 elements)" in long
    assert "token 8" not in long


def test_terminal_sequences_in_names_are_escaped(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = inspect(capsys, small_model, "--metadata")
    assert "\x1b" not in out
    assert r"A \x1b[31mred name" in out


def test_json_has_everything_that_text_has(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(inspect(capsys, small_model, "--json"), parse_constant=pytest.fail)
    assert found["version"] == 3
    assert found["bytes"] == 4480
    assert found["weights"] == 4128
    assert found["types"]["Q8_0"] == {"tensors": 4, "weights": 4096, "bytes": 4352}
    assert found["layers"]["1"] == {"tensors": 2, "bytes": 2176}
    assert found["metadata"]["llama.infinite"] == "inf"
    assert found["metadata"]["tokenizer.ggml.tokens"] == {
        "length": 100,
        "first": [f"token {number}" for number in range(8)],
    }
    first = found["tensors"][0]
    assert (first["name"], first["type"], first["shape"], first["bytes"]) == (
        "blk.0.attn_q.weight",
        "Q8_0",
        [32, 32],
        1088,
    )
    assert first["offset"] == found["data_offset"]


def test_json_with_metadata_has_arrays_in_full(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(inspect(capsys, small_model, "--json", "--metadata"))
    assert found["metadata"]["tokenizer.ggml.tokens"] == [f"token {number}" for number in range(100)]
