"""What every command has in common: exit codes, one-line errors, help, Ctrl-C, a reader that goes away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from asyncload import __version__
from asyncload.cli import _parser as parser_module
from asyncload.cli import main

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.mark.parametrize("command", ["inspect", "load"])
def test_a_failure_is_one_line_on_stderr_and_1(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(tmp_path / "no such\nfile.gguf")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("asyncload: error: ")
    assert r"no such\nfile.gguf" in captured.err
    assert captured.err.count("\n") == 1


def test_a_file_that_is_no_gguf_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    assert main(["inspect", str(path)]) == 1
    assert "(at byte 0)" in capsys.readouterr().err


def test_a_bad_option_in_the_environment_is_a_failure(
    small_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASYNCLOAD_CHUNK_SIZE", "much")
    assert main(["load", str(small_model)]) == 1
    assert "ASYNCLOAD_CHUNK_SIZE='much'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["inspect"], ["fetch", "x"], ["load", "x", "--dtype", "=f32"], ["load", "x", "--fast"]]
)
def test_arguments_that_make_no_sense_are_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: asyncload" in capsys.readouterr().err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    assert "asyncload load model.gguf --device host --dtype bf16" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"asyncload {__version__}\n"


def test_the_module_is_the_command(small_model: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "asyncload", "inspect", str(small_model)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert "Q8_0" in process.stdout


def test_a_keyboard_interrupt_is_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(parser_module, "_inspect", interrupted)
    assert main(["inspect", "x"]) == 130
    assert capsys.readouterr().err == "asyncload: interrupted\n"


def test_ctrl_c_during_a_load_is_130(small_model: Path) -> None:
    # The progress bar sends the signal itself, so that it comes while the load runs.
    script = """
import os, signal, sys
from asyncload.cli import _load, main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started deaf to it

class Interrupt:
    def __init__(self, stream): pass
    def __call__(self, progress): os.kill(os.getpid(), signal.SIGINT)
    def close(self): pass

_load.ProgressBar = Interrupt
sys.stderr.isatty = lambda: True
sys.exit(main(["load", sys.argv[1], "--device", "host"]))
"""
    process = subprocess.run(
        [sys.executable, "-c", script, str(small_model)], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "asyncload: interrupted\n")


def test_a_reader_that_goes_away_is_no_traceback(small_model: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "-m", "asyncload", "inspect", str(small_model)],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    os.close(write)
    assert (process.returncode, process.stderr) == (1, "")
