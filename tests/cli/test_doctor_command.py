from __future__ import annotations

import json
import sys
from typing import Any

import pytest

import asyncload
from asyncload.cli import main


def examine(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert main(["doctor", "--json", *arguments]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "asyncload_native", None)


@pytest.mark.native
def test_the_native_engine_serves_where_it_was_built(capsys: pytest.CaptureFixture[str]) -> None:
    found = examine(capsys, "--device", "host")
    assert found["engine"] == {"device": "host", "asked": "auto", "serves": "native", "problem": None}
    assert found["native"]["version"] == found["asyncload"]["version"] == asyncload.__version__


@pytest.mark.native
def test_the_python_engine_serves_where_it_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASYNCLOAD_ENGINE", "python")
    found = examine(capsys, "--device", "host")
    assert found["engine"] == {"device": "host", "asked": "python", "serves": "python", "problem": None}


@pytest.mark.usefixtures("no_extension")
def test_without_the_extension_the_python_engine_serves_and_the_reason_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = examine(capsys, "--device", "host")
    assert (found["engine"]["serves"], found["native"]["version"]) == ("python", None)
    for problem in (found["engine"]["problem"], found["native"]["problem"], found["driver"]["problem"]):
        assert "asyncload_native" in problem


@pytest.mark.usefixtures("no_extension")
def test_a_load_that_cannot_work_is_a_failure_after_the_report(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASYNCLOAD_ENGINE", "native")
    assert main(["doctor", "--device", "host"]) == 1
    captured = capsys.readouterr()
    assert "none for host (asked for: native)" in captured.out
    assert captured.err.startswith("asyncload: error: ")
    assert "asyncload_native" in captured.err


def test_an_unknown_device_is_a_failure_after_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    found = examine(capsys, "--device", "tpu", code=1)
    assert found["engine"]["serves"] is None
    assert "tpu" in found["engine"]["problem"]


def test_compilers_caches_and_memory_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    import numba

    found = examine(capsys, "--device", "host")
    assert found["numba"]["version"] == numba.__version__
    assert found["numba"]["kernels"]
    assert found["nvrtc"]["problem"] is None
    assert found["memory"]["available"] > 0


def test_text_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "host"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names[:4] == ["asyncload", "engine", "native", "driver"]
    assert all(name.startswith("cuda") for name in names[4:-3])
    assert names[-3:] == ["nvrtc", "numba", "memory"]


@pytest.mark.gpu
def test_driver_and_devices_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    found = examine(capsys)
    assert found["engine"]["device"] == "cuda:0"
    assert found["driver"]["version"]
    assert found["driver"]["cuda"]
    device = found["cuda"]["devices"][0]
    assert device["name"] == "cuda:0"
    assert 0 < device["free"] <= device["total"]
