from __future__ import annotations

import json
from pathlib import Path

import pytest

from asyncload.gguf import GGMLType
from asyncload.quant import FAMILIES, DType
from bench.dequant import goal_of_limit, main


def test_the_benchmark_runs_at_toy_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "record.json"
    main(["--quick", "--types", "Q8_0", "F16", "--json", str(record)])
    results = json.loads(record.read_text())["results"]
    rows = results["rows"]
    assert {(row["type"], row["dtype"]) for row in rows} == {
        *(("Q8_0", dtype) for dtype in ("float32", "float16", "bfloat16")),
        *(("F16", dtype) for dtype in ("float32", "bfloat16")),
    }
    assert all(row["gweights"] > 0 and row["of_limit"] > 0 for row in rows)
    assert all(row["over_gguf"] > 0 and row["over_ggml"] > 0 for row in rows if row["type"] == "Q8_0")
    assert all(row["missed"] == [] for row in rows if row["type"] == "F16")
    assert all(seconds > 0 for seconds in results["start"].values())
    assert results["late"]["p50"] <= results["late"]["p99"]
    printed = capsys.readouterr().out
    assert "bytes / limit" in printed
    assert "Q8_0 -> bfloat16" in printed


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16])
def test_every_quantized_type_has_a_goal(dtype: DType) -> None:
    assert all((goal_of_limit(type_, dtype) is not None) is type_.quantized for type_ in FAMILIES)
    assert goal_of_limit(GGMLType.Q4_K, dtype) == (0.90, 0.80)
