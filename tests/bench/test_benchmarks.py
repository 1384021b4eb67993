"""Each benchmark works, at toy size, and writes what is needed to judge its figures."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from asyncload.testing import synthesize
from bench import demo
from bench._demo_model import DemoError


def run(name: str, folder: Path, *arguments: str) -> Any:
    """Runs a benchmark at toy size on the host and returns its results."""
    target = folder / "results" / f"{name}.json"
    main = import_module(f"bench.{name}").main
    assert main(["--quick", "--device", "host", "--json", str(target), *arguments]) == 0
    record = json.loads(target.read_text())
    assert record["benchmark"] == name
    assert set(record) == {"benchmark", "command", "date", "commit", "dirty", "machine", "options", "results"}
    assert record["machine"]["cores"] >= 1
    assert "asyncload" in record["machine"]["packages"] or "numpy" in record["machine"]["packages"]
    return record["results"]


def test_load_has_the_limit_and_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = run("load", tmp_path)
    assert results["limit_bytes_per_second"] > 0
    rows = {row["loader"]: row for row in results["rows"]}
    assert {"asyncload, packed", "asyncload, bf16", "asyncload, header only"} <= set(rows)
    assert rows["asyncload, packed"]["device_bytes"] == results["file_bytes"]
    assert all(row["seconds"] > 0 for row in rows.values())
    assert rows["asyncload, packed"]["of_limit"] > 0
    assert "of limit" in capsys.readouterr().out


def test_chunks_are_compared_with_one_copy(tmp_path: Path) -> None:
    rows = run("chunks", tmp_path)["rows"]
    assert rows[0]["of_one_copy"] == 1
    assert len(rows) > 2


def test_latency_counts_ticks(tmp_path: Path) -> None:
    rows = run("latency", tmp_path, "--ticks", "60")["rows"]
    assert list(rows) == ["idle", "packed", "bf16"]
    for row in rows.values():
        assert row["ticks"] >= 60
        late = row["milliseconds"]
        assert late["p50"] <= late["p99"] <= late["p99.9"] <= late["max"]


def test_memory_is_held_against_its_bound(tmp_path: Path) -> None:
    results = run("memory", tmp_path)
    assert results["before"] < results["entered"] <= results["peak"]
    assert results["added"] <= results["bound"]


def test_overlap_compares_with_the_slower_alone(tmp_path: Path) -> None:
    results = run("overlap", tmp_path)
    assert {row["how"] for row in results["rows"]} >= {"pipelined", "one thread", "one stream", "unpipelined"}
    assert all(row["of_slower"] > 0 for row in results["rows"])


def test_start_measures_imports(tmp_path: Path) -> None:
    results = run("start", tmp_path)
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
