from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.dequant import main


def test_the_benchmark_runs_at_toy_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "record.json"
    main(["--quick", "--types", "Q8_0", "F16", "--json", str(record)])
    rows = json.loads(record.read_text())["results"]
    assert {(row["type"], row["dtype"]) for row in rows} == {
        *(("Q8_0", dtype) for dtype in ("float32", "float16", "bfloat16")),
        *(("F16", dtype) for dtype in ("float32", "bfloat16")),
    }
    assert all(row["gweights"] > 0 and row["of_limit"] > 0 and row["over_gguf"] > 0 for row in rows)
    printed = capsys.readouterr().out
    assert "bytes / limit" in printed
    assert "Q8_0 -> bfloat16" in printed
