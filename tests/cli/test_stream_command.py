from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asyncload.cli import main

LAYERS = (0, 1, 2, 3)


def stream(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["stream", "--device", "host", "--free", "1GiB", *map(str, arguments)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def stream_json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    return dict(json.loads(stream(capsys, *arguments, "--json")))


@pytest.mark.parametrize("host", ["slabs", "file"])
def test_passes_and_their_figures(tiny_model: Path, capsys: pytest.CaptureFixture[str], host: str) -> None:
    found = stream_json(
        capsys, tiny_model, "--mode", "stream", "--slots", "3", "--host", host, "--passes", "2", "--dtype", "bf16"
    )
    assert (found["mode"], found["device"], found["host"]) == ("stream", "host", host)
    assert found["layers"] == {"resident": [], "streamed": [*LAYERS]}
    assert found["slots"]["count"] == 3
    assert found["link_bytes_per_second"] > 0
    assert len(found["passes"]) == 2
    for figures in found["passes"]:
        assert set(figures) == {
            *("wall", "copy", "compute", "lower_bound", "exposed_stall", "scheduling_stall"),
            *("bytes", "bytes_per_second", "share_of_link"),
        }
        assert figures["wall"] >= figures["lower_bound"] - 1e-9 > 0  # what adding floats loses
        assert figures["scheduling_stall"] == figures["wall"] - figures["lower_bound"]
        assert figures["bytes_per_second"] == figures["bytes"] / figures["copy"]
        assert figures["share_of_link"] == figures["bytes_per_second"] / found["link_bytes_per_second"]


def test_figures_by_layer(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (tiny_model, "--mode", "hybrid", "--layers", "--passes", "2")
    found = stream_json(capsys, *arguments)
    for figures in found["passes"]:
        assert [timing["number"] for timing in figures["layers"]] == [*LAYERS]
        stays = [timing["number"] for timing in figures["layers"] if timing["slot"] is None]
        assert stays == found["layers"]["resident"]
        assert figures["bytes"] == sum(timing["nbytes"] for timing in figures["layers"]) > 0
    lines = [line.split() for line in stream(capsys, *arguments).splitlines()]
    table = lines[lines.index(["layer", "slot", "bytes", "copy", "s", "compute", "s", "waited", "s"]) + 1 :]
    assert [int(line[0]) for line in table] == [*LAYERS]
    assert [int(line[0]) for line in table if line[1] == "stays"] == found["layers"]["resident"]


def test_text_has_the_plan_and_a_line_for_each_pass(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.split() for line in stream(capsys, tiny_model, "--mode", "stream").splitlines()]
    assert ["mode", "stream"] in lines
    assert ["layers", "0", "stay,", "4", "stream"] in lines
    assert [line[0] for line in lines[-3:]] == ["0", "1", "2"]
    assert all(line[-1].endswith("%") for line in lines[-3:])
    assert ["host", "nothing"] in [line.split() for line in stream(capsys, tiny_model).splitlines()]


def test_a_trace_has_streams_slots_and_threads(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASYNCLOAD_ENGINE", "python")
    path = tmp_path / "trace.json"
    path.write_text("what was there before")
    stream(capsys, tiny_model, "--mode", "stream", "--trace", path, "--host", "file", "--passes", "2")
    events = json.loads(path.read_text())["traceEvents"]
    rows = {event["args"]["name"] for event in events if event["name"] == "thread_name" and event["pid"] == 1}
    assert {"copy stream 0", "compute", "slot 0", "slot 1"} <= rows
    assert {name.rstrip("0123456789") for name in rows if name.startswith("thread ")} >= {
        *("thread asyncload-reader_", "thread asyncload-stream", "thread asyncload-events"),
    }


def test_a_trace_that_cannot_be_written_fails_before_the_passes(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "nowhere" / "trace.json"
    assert main(["stream", str(tiny_model), "--device", "host", "--trace", str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"asyncload: error: the trace cannot be written to {path}: No such file or directory\n"


@pytest.mark.parametrize("wrong", [("--passes", "0"), ("--passes", "many"), ("--host", "disk")])
def test_arguments_that_make_no_sense(
    wrong: tuple[str, str], tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["stream", str(tiny_model), *wrong])
    assert caught.value.code == 2
    assert "asyncload stream: error: " in capsys.readouterr().err


def test_what_does_not_fit_is_one_line(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stream", str(tiny_model), "--device", "host", "--free", "1MiB"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "available of 1.0 MiB free" in captured.err


@pytest.mark.gpu
@pytest.mark.parametrize("host", ["slabs", "file"])
def test_passes_on_a_gpu(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], host: str) -> None:
    trace = tmp_path / "trace.json"
    arguments = ("--mode", "stream", "--dtype", "bf16", "--host", host, "--trace", str(trace), "--json")
    assert main(["stream", str(tiny_model), "--device", "cuda:0", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["mode"], found["device"], found["host"]) == ("stream", "cuda:0", host)
    assert len(found["passes"]) == 3
    for figures in found["passes"]:
        assert figures["wall"] >= figures["lower_bound"] - 1e-6 > 0  # the device counts half microseconds
    events = json.loads(trace.read_text())["traceEvents"]
    rows = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"copy stream 0", "compute", "slot 0", "slot 1"} <= rows
    assert any(name.startswith("thread asyncload-") for name in rows)
