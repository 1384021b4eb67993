"""Each benchmark works, at toy size, and writes what is needed to judge its figures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from asyncload import Options
from asyncload.testing import _synthesize, synthesize
from asyncload.testing._presets import PRESETS
from bench import _common, _load_check, _peers, demo, load
from bench._common import make_parser, options_of
from bench._demo_model import DemoError

ENGINES = ["python", pytest.param("native", marks=pytest.mark.native)]
DECODED = ("bf16, decode=device", "bf16, decode=host")


def run(name: str, folder: Path, *arguments: str) -> Any:
    """Runs a benchmark at toy size on the host and returns its results."""
    return record_of(name, folder, "--device", "host", *arguments)["results"]


def record_of(name: str, folder: Path, *arguments: str) -> Any:
    """Runs a benchmark at toy size and returns what it writes."""
    target = folder / "results" / f"{name}.json"
    main = import_module(f"bench.{name}").main
    assert main(["--quick", "--json", str(target), *arguments]) == 0
    record = json.loads(target.read_text())
    assert record["benchmark"] == name
    assert set(record) == {"benchmark", "command", "date", "commit", "dirty", "machine", "options", "results"}
    assert record["machine"]["cores"] >= 1
    assert "asyncload" in record["machine"]["packages"] or "numpy" in record["machine"]["packages"]
    return record


def use(monkeypatch: pytest.MonkeyPatch, *made: _peers.Peer) -> None:
    """Has the benchmark of loading measure these peers."""

    def peers(*_arguments: Any, **_more: Any) -> Iterator[_peers.Peer]:
        return iter(made)

    monkeypatch.setattr(load, "peers", peers)


def test_load_has_the_limit_and_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = run("load", tmp_path, "--decode", "device", "host")
    assert results["limit_bytes_per_second"] > 0
    rows = {row["loader"]: row for row in results["rows"]}
    packed, on_device, on_host = (rows[f"asyncload, {way}"] for way in ("packed", *DECODED))
    assert packed["device_bytes"] == results["file_bytes"]
    assert on_device["device_bytes"] == on_host["device_bytes"] > results["file_bytes"]
    for row in rows.values():
        assert row["seconds"] > 0
        assert row["times_packed"] == pytest.approx(row["seconds"] / packed["seconds"])
        assert row["times_decoded"] == pytest.approx(row["seconds"] / on_device["seconds"])
    assert packed["of_limit"] == pytest.approx(
        results["file_bytes"] / packed["seconds"] / results["limit_bytes_per_second"]
    )
    assert rows["asyncload, header only"]["of_limit"] == 0
    assert "of limit" in capsys.readouterr().out


def test_load_compares_a_tensor_of_each_type_with_gguf_py(tmp_path: Path) -> None:
    rows = {row["loader"]: row for row in run("load", tmp_path, "--decode", "device", "host", "--peers")["rows"]}
    for way in DECODED:
        assert rows[f"asyncload, {way}"]["check"] == {"against": "gguf-py", "tensors": 5, "different": []}
    assert rows["asyncload, packed"]["check"] is None


def test_load_fails_where_weights_differ_from_gguf_py(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = _load_check.expected

    def wrong(reference: Any) -> bytes:
        values = bytearray(right(reference))
        values[0] ^= 1
        return bytes(values)

    monkeypatch.setattr(_load_check, "expected", wrong)
    assert load.main(["--quick", "--device", "host", "--peers"]) == 1
    assert "5 of 5 tensors DIFFERENT from gguf-py" in capsys.readouterr().out


def test_load_says_loudly_what_is_not_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str) -> object | None:
        return None if name == "accelerate" else object()

    monkeypatch.setattr(_peers, "find_spec", find)
    results = run("load", tmp_path, "--peers", "transformers")
    assert results["not_measured"] == {"transformers": "not installed: accelerate"}
    assert all("transformers" not in row["loader"] for row in results["rows"])
    assert "transformers: NOT MEASURED, not installed: accelerate" in capsys.readouterr().out


def test_a_peer_that_fails_leaves_the_other_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> _peers.Run:
        raise ValueError("not this file")

    use(monkeypatch, _peers.Peer("broken", fail), _peers.Peer("working", lambda: _peers.Run(2.0)))
    results = run("load", tmp_path, "--peers")
    assert results["not_measured"] == {"broken": "ValueError: not this file"}
    assert results["rows"][-1]["loader"] == "working"


@pytest.mark.torch
def test_what_gguf_py_decodes_is_compared_with_ours(tmp_path: Path) -> None:
    peer = run("load", tmp_path, "--peers", "gguf-py")["rows"][-1]
    assert peer["loader"] == "gguf-py + torch, bf16"
    assert peer["check"] == {"against": "asyncload", "tensors": 40, "different": []}
    assert peer["remark"] == ""


@pytest.mark.torch
def test_a_share_of_the_bytes_is_extrapolated_and_says_so(tmp_path: Path) -> None:
    peer = run("load", tmp_path, "--peers", "gguf-py", "--peer-share", "0.2")["rows"][-1]
    assert peer["remark"].startswith("extrapolated from ")
    assert 0 < peer["check"]["tensors"] < 40


@pytest.mark.torch
def test_load_fails_where_a_peers_weights_differ(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = import_module("torch")
    tensors = {
        "output_norm.weight": torch.zeros(320, dtype=torch.bfloat16),
        "token_embd.weight": torch.zeros(1000, 320),
    }
    use(monkeypatch, _peers.Peer("wrong", lambda: _peers.Run(1.0, "", tensors)))
    assert load.main(["--quick", "--device", "host", "--peers"]) == 1
    assert "2 of 2 tensors DIFFERENT from asyncload" in capsys.readouterr().out


@pytest.mark.transformers
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize(("preset", "same"), [("tiny", 31), ("tied", 30)])
def test_transformers_loads_a_synthetic_model_as_we_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str, same: int
) -> None:
    if preset == "tied":
        tied = replace(PRESETS["tiny"], tied=True)
        monkeypatch.setattr(_synthesize, "PRESETS", {"tiny": tied})
    peer = run("load", tmp_path, "--peers", "transformers")["rows"][-1]
    assert peer["loader"] == "transformers, bf16"
    assert peer["check"] == {"against": "asyncload", "tensors": same, "different": []}


def test_goals_are_judged() -> None:
    met = load.goals(packed=1.0, decoded=1.05, transformers=400.0)
    assert [(goal["times"], goal["met"]) for goal in met] == [(1.05, True), (pytest.approx(380.95, rel=1e-4), True)]
    assert not any(goal["met"] for goal in load.goals(packed=1.0, decoded=2.0, transformers=300.0))
    assert load.goals(packed=None, decoded=1.0, transformers=None) == []


@pytest.mark.parametrize("share", ["0", "1.5", "x"])
def test_a_share_lies_between_nothing_and_all(share: str) -> None:
    with pytest.raises(SystemExit):
        load.main(["--quick", "--peer-share", share])


def test_chunks_are_compared_with_one_copy(tmp_path: Path) -> None:
    rows = run("chunks", tmp_path)["rows"]
    assert rows[0]["of_one_copy"] == 1
    assert len(rows) > 2


def test_latency_counts_ticks(tmp_path: Path) -> None:
    rows = run("latency", tmp_path, "--ticks", "60")["rows"]
    assert list(rows) == ["idle", "bare reads", "packed", "bf16"]
    for row in rows.values():
        assert row["ticks"] >= 60
        late = row["milliseconds"]
        assert late["p50"] <= late["p99"] <= late["p99.9"] <= late["max"]


@pytest.mark.parametrize("engine", ENGINES)
def test_memory_is_held_against_its_bound(tmp_path: Path, engine: Any) -> None:
    results = run("memory", tmp_path, "--engine", engine)
    assert results["before"] < results["entered"] <= results["peak"]
    assert results["added"] <= results["bound"]
    assert results["staging"] == Options(engine=engine).suited_to("host").staging


@pytest.mark.parametrize(
    ("engine", "ways"),
    [
        ("python", ["pipelined", "one thread", "one stream", "unpipelined"]),
        pytest.param("native", ["pipelined", "one thread"], marks=pytest.mark.native),
    ],
)
def test_overlap_compares_with_the_slower_alone(tmp_path: Path, engine: str, ways: list[str]) -> None:
    results = run("overlap", tmp_path, "--engine", engine)
    assert [row["how"] for row in results["rows"]] == ["decode alone", "copy alone", *ways]
    assert all(row["of_slower"] > 0 for row in results["rows"])
    assert results["real_copies"] is (engine == "native")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["load", "latency"])
def test_the_engine_that_is_asked_for_loads(tmp_path: Path, begun: list[str], name: str, engine: str) -> None:
    more = {"load": ["--peers"], "latency": ["--ticks", "5", "--nice", "3"]}[name]
    record = record_of(name, tmp_path, "--device", "host", "--engine", engine, *more)
    assert begun
    assert set(begun) == {engine} == {record["options"]["engine"]}
    assert record["options"]["nice"] == (3 if name == "latency" else 10)


def test_arguments_go_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCLOAD_ENGINE", "native")
    monkeypatch.setenv("ASYNCLOAD_THREADS", "3")
    parser = make_parser("")
    assert options_of(parser.parse_args([])) == Options(engine="native", threads=3)
    assert options_of(parser.parse_args(["--engine", "python"])) == Options(engine="python", threads=3)
    with pytest.raises(SystemExit):
        parser.parse_args(["--engine", "steam"])


@pytest.mark.parametrize(("there", "engine"), [("GNU 14", "native"), (None, "python")])
def test_the_engine_that_is_there_stands_in_the_record(
    monkeypatch: pytest.MonkeyPatch, there: str | None, engine: str
) -> None:
    monkeypatch.delenv("ASYNCLOAD_ENGINE", raising=False)
    monkeypatch.setattr(_common, "_native_compiler", lambda: there)
    assert options_of(make_parser("").parse_args([])).engine == engine


def test_start_measures_imports(tmp_path: Path) -> None:
    results = record_of("start", tmp_path)["results"]
    assert results["bare"] > 0
    assert "import asyncload" in results["seconds"]


def test_the_demo_checks_every_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.gguf"
    synthesize(file, preset="tiny", quant="Q4_K_M")
    assert demo.main(["--device", "host", "--file", str(file)]) == 0
    out = capsys.readouterr().out
    assert "DIFFERENT" not in out
    for kind in ("F32", "Q5_0", "Q8_0"):
        assert sum(line.startswith(f"{kind} ") and line.endswith("same") for line in out.splitlines()) >= 2
    assert "bottleneck" in out


def test_the_demo_fails_where_values_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.gguf"
    synthesize(file, preset="tiny", quant="Q4_K_M")
    right = demo.expected

    def wrong(reference: Any, tensor: Any) -> bytes:
        values = bytearray(right(reference, tensor))
        values[-1] ^= 1
        return bytes(values)

    monkeypatch.setattr(demo, "expected", wrong)
    assert demo.main(["--device", "host", "--file", str(file)]) == 1
    captured = capsys.readouterr()
    assert "DIFFERENT" in captured.out
    assert "differ from gguf-py's" in captured.err
    assert DemoError.__name__ not in captured.err
