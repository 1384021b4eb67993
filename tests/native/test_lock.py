"""Opening a file keeps the interpreter lock, but not for long."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.native.conftest import Turns

pytestmark = pytest.mark.native


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    return path


def test_a_file_is_opened_without_giving_the_interpreter_lock_up(path: Path, turns: Turns) -> None:
    from asyncload_native import File, ReadError

    before = turns.count
    opened = [File.open(bytes(path), 600, patience=60.0) for _ in range(100)]
    with pytest.raises(ReadError):
        File.open(bytes(path.with_name("none")), 600, patience=60.0)
    after = turns.count
    assert [len(head) for _, head in opened] == [600] * 100
    assert after == before


def test_the_lock_is_given_up_where_opening_takes_long(path: Path, turns: Turns) -> None:
    from asyncload_native import File

    before = turns.count
    while turns.count == before:  # without patience anything takes long
        assert len(File.open(bytes(path), 600, patience=0.0)[1]) == 600
