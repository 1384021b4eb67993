"""An event loop for one command."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from typing import TypeVar

import anyio

__all__ = ["run"]

T = TypeVar("T")


def run(function: Callable[[], Awaitable[T]]) -> T:
    """Runs an async function on asyncio, on uvloop where that is installed."""
    return anyio.run(function, backend_options={"use_uvloop": find_spec("uvloop") is not None})
