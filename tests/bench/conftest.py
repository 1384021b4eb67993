from __future__ import annotations

from typing import Any

import pytest

from asyncload.pipeline._native import NativeTransfer
from asyncload.pipeline._python_transfer import PythonTransfer


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The engine of each transfer, in order."""
    engines: list[str] = []

    def note(transfer: type[Any], engine: str) -> None:
        go = transfer.run

        async def run(self: Any) -> None:
            engines.append(engine)
            await go(self)

        monkeypatch.setattr(transfer, "run", run)

    note(PythonTransfer, "python")
    note(NativeTransfer, "native")
    return engines
