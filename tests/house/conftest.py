"""A folder with the model that the documentation's examples load."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncload.testing import synthesize


@pytest.fixture(scope="session")
def documented_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("docs") / "model.gguf"
    synthesize(path, preset="tiny", quant="Q4_K_M")
    return path


@pytest.fixture
def demo_folder(tmp_path: Path, documented_model: Path) -> Path:
    """A folder of the test's own with ``model.gguf`` in it."""
    (tmp_path / "model.gguf").hardlink_to(documented_model)
    return tmp_path
