"""A model of six layers that differ in size, and the invariants that hold however a load ends."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import anyio
import pytest

from tests.layers.models import Content, make_model
from tests.loader.conftest import nothing_left

__all__ = ["nothing_left"]


@pytest.fixture(scope="session")
def six_layers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Content]:
    """The path, and what each tensor is in float16."""
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    return anyio.run(partial(make_model, path, 6, uneven=True))
