"""What all tests share: the matrix of backends, the watch over blocking calls, the needs that a machine may miss."""

from __future__ import annotations

import gc
import os
import re
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any, Final

import pytest
from blockbuster import blockbuster_ctx
from hypothesis import settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Shared machines are slow at times, and a slow example is no failure: pytest-timeout guards against hangs.
# Tests that hold a stream up must not hold up others, which share its queue on the device where there are more streams.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

settings.register_profile("asyncload", deadline=None, max_examples=int(os.environ.get("ASYNCLOAD_EXAMPLES", "100")))
settings.load_profile("asyncload")


_BACKENDS: dict[str, tuple[str, dict[str, bool]]] = {
    "asyncio": ("asyncio", {"use_uvloop": False}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}


@pytest.fixture(params=_BACKENDS.values(), ids=list(_BACKENDS))
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Runs a test marked ``anyio`` once on each event loop that asyncload supports."""
    return request.param


@pytest.fixture(autouse=True)
def _no_blocking_calls(request: pytest.FixtureRequest) -> Iterator[None]:
    """Makes a blocking call below asyncload's own code, on the thread of a running asyncio loop, an error.

    What a test itself does on its loop is its own affair. Trio's loop is not seen by blockbuster; the same code runs
    there.
    """
    if all(request.node.get_closest_marker(mark) is None for mark in ("anyio", "asyncio")):
        yield
        return
    with blockbuster_ctx("asyncload"):
        yield


_HEAVY: Final = ("gguf", "numba", "torch")
_frozen: list[str] = []


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """What a heavy package made when it was imported is no garbage: collecting, which many tests do, passes it over."""
    if (loaded := [name for name in _HEAVY if name in sys.modules]) != _frozen:
        gc.collect()
        gc.freeze()
        _frozen[:] = loaded


# --- what a machine may miss ----------------------------------------------------------------------------------------


@cache
def _missing_gpu() -> str | None:
    """Why no CUDA device can be used here, or None."""
    from asyncload.device import open_device
    from asyncload.errors import AsyncloadError

    try:
        open_device("cuda").close()
    except AsyncloadError as error:
        return str(error)
    return None


@cache
def _missing_native() -> str | None:
    """Why the C++ engine cannot be used here, or None."""
    try:
        import_module("asyncload_native")
    except ImportError as error:
        return f"{error}: `make native` builds it"
    return None


def _missing_package(name: str) -> Callable[[], str | None]:
    return lambda: None if find_spec(name) else f"{name} is not installed"


def _missing_strategy(name: str) -> Callable[[], str | None]:
    @cache
    def missing() -> str | None:
        """Why files in the folder for temporary ones cannot be read like this, or None."""
        if reason := _missing_native():
            return reason
        from asyncload_native import File, Strategy, unavailable

        with NamedTemporaryFile() as file:
            return unavailable(Strategy[name], File.share(file.name, file.fileno()))

    return missing


@cache
def _missing_nowait() -> str | None:
    """Why the page cache cannot be asked about files in the folder for temporary ones, or None."""
    with NamedTemporaryFile() as file:
        try:
            os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
        except OSError as error:
            return f"RWF_NOWAIT: {error.strerror}"
    return None


def _missing_core() -> str | None:
    return None if len(os.sched_getaffinity(0)) > 1 else "this process may use one only"


def _missing_demo_model() -> str | None:
    from bench._demo_model import NAME, cache_folder

    return None if (cache_folder() / NAME).exists() else f"{NAME} is not in {cache_folder()}: `make demo` fetches it"


_NEEDS: dict[str, Callable[[], str | None]] = {
    "gpu": _missing_gpu,
    "native": _missing_native,
    "direct": _missing_strategy("DIRECT"),
    "uring": _missing_strategy("URING"),
    "nowait": _missing_nowait,
    "cores": _missing_core,
    "torch": _missing_package("torch"),
    "transformers": _missing_package("transformers"),
    "cupy": _missing_package("cupy"),
    "demo": _missing_demo_model,
    "ggml": _missing_package("libggml"),
}
_SKIPPED: Final = re.compile(r"needs (\w+): (.*)", re.DOTALL)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test whose need this machine misses; fails it where the need is required."""
    for need, missing in _NEEDS.items():
        if item.get_closest_marker(need) is None:
            continue
        if (reason := missing()) is None:
            continue
        if os.environ.get(variable := f"ASYNCLOAD_REQUIRE_{need.upper()}") == "1":
            pytest.fail(f"{variable}=1, but: {reason}", pytrace=False)
        pytest.skip(f"needs {need}: {reason}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says loudly what did not run, in whichever process: silence is not success."""
    not_run: dict[str, list[str]] = {}
    for report in terminalreporter.getreports("skipped"):
        where: Any = report.longrepr
        message = str(where[2] if report.skipped else "")
        if found := _SKIPPED.fullmatch(message.removeprefix("Skipped: ")):
            not_run.setdefault(found[1], []).append(found[2])
    for need, reasons in not_run.items():
        terminalreporter.write_sep("=", f"{need.upper()}: {len(reasons)} tests did NOT run", red=True, bold=True)
        for reason in sorted(set(reasons)):
            terminalreporter.write_line(f"{need.upper()}: {reason}", red=True)
