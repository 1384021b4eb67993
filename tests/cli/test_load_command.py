from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path

import pytest

from asyncload.cli import main
from asyncload.cli.progress import ProgressBar
from asyncload.events import Progress, Stage


def load(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["load", "--device", "host", *map(str, arguments)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""  # no terminal, no progress bar
    return captured.out


def test_the_summary_has_bytes_stages_and_the_bottleneck(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = [line.split() for line in load(capsys, small_model).splitlines()]
    assert ["tensors", "5", "on", "host"] in out
    assert ["Q8_0", "4", "4,352"] in out
    assert ["F32", "1", "128"] in out
    assert {"read", "decode", "upload"} <= {line[0] for line in out if line}
    assert any(line[:1] == ["bottleneck"] and line[1] in {"read", "decode", "upload"} for line in out)
    assert any(line[:1] == ["reading"] and len(line) > 1 for line in out)


def test_json_says_the_same(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(load(capsys, small_model, "--json"))
    assert found["device"] == "host"
    assert found["tensors"] == 5
    assert found["types"] == {"Q8_0": {"tensors": 4, "bytes": 4352}, "F32": {"tensors": 1, "bytes": 128}}
    assert found["bytes_read"] == found["bytes_uploaded"] == 4480
    assert found["stages"]["upload"]["bytes"] == 4480
    assert found["bottleneck"] in found["stages"]
    assert found["reading"]
    assert found["seconds"] > 0


def test_one_dtype_decodes_everything(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(load(capsys, small_model, "--json", "--dtype", "f16"))
    assert found["types"] == {
        "Q8_0 as float16": {"tensors": 4, "bytes": 4 * 2048},
        "F32 as float16": {"tensors": 1, "bytes": 64},
    }


def test_patterns_decode_what_they_match_and_a_plain_dtype_the_rest(
    small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(load(capsys, small_model, "--json", "--dtype", "bf16", "--dtype", "blk.0.*=f32"))
    assert found["types"] == {
        "Q8_0 as float32": {"tensors": 2, "bytes": 2 * 4096},
        "Q8_0 as bfloat16": {"tensors": 2, "bytes": 2 * 2048},
        "F32 as bfloat16": {"tensors": 1, "bytes": 64},
    }
    found = json.loads(load(capsys, small_model, "--json", "--dtype", "blk.0.*=f32"))
    assert found["types"]["Q8_0"] == {"tensors": 2, "bytes": 2176}


def test_select_takes_layers_and_globs(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(load(capsys, small_model, "--json", "--select", "1", "--select", "output*"))
    assert found["types"] == {"Q8_0": {"tensors": 2, "bytes": 2176}, "F32": {"tensors": 1, "bytes": 128}}


@pytest.mark.parametrize("wrong", [("--dtype", "f64"), ("--select", "7"), ("--device", "abacus")])
def test_what_cannot_be_done_is_a_failure(
    wrong: tuple[str, str], small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["load", str(small_model), *wrong]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("asyncload: error: ")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("switch", [[], ["--no-progress"]])
def test_a_terminal_gets_a_progress_bar_unless_it_is_switched_off(
    switch: list[str], small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["load", str(small_model), "--device", "host", *switch]) == 0
    if switch:
        assert terminal.getvalue() == ""
    else:
        assert "100 %" in terminal.getvalue()
        assert "5/5 tensors" in terminal.getvalue()
        assert terminal.getvalue().endswith("\n")


def progress(stage: Stage, done: int) -> Progress:
    return Progress(stage=stage, bytes_done=done, bytes_total=1000, tensors_done=0, tensors_total=3, elapsed=0.5)


def test_a_bar_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    terminal = Terminal()
    ProgressBar(terminal)(progress("done", 1000))
    drawn = terminal.getvalue().removeprefix("\r").removesuffix("\x1b[K")
    assert len(drawn) < 20


def test_a_bar_that_was_never_drawn_ends_nothing() -> None:
    terminal = Terminal()
    ProgressBar(terminal).close()
    assert terminal.getvalue() == ""


def test_a_bar_is_drawn_seldom_but_at_the_start_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    terminal = Terminal()
    bar = ProgressBar(terminal)
    bar(progress("start", 0))
    for done in range(0, 1000, 10):
        now += 0.01
        bar(progress("load", done))
    bar(progress("done", 1000))
    drawn = terminal.getvalue().split("\r")[1:]
    assert " 0 %" in drawn[0]
    assert "100 %" in drawn[-1]
    assert 10 < len(drawn) < 25  # one second of events, at most 20 drawings in it
