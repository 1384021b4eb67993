from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from asyncload import blocking
from asyncload.errors import ClosedError, SourceNotFoundError
from asyncload.events import Progress
from asyncload.options import EngineOption, Options


def test_the_same_front_door_without_a_loop(model_path: Path, small: Options) -> None:
    before = threading.active_count()
    header = blocking.read_header(model_path)
    with blocking.Loader("host", options=small) as loader:
        events: list[Progress] = []
        model = loader.load(model_path, dtype="f32", progress=events.append)
        assert list(model) == list(header.tensors)
        assert events[-1].stage == "done"
        with loader.tensors(model_path, select="*norm*") as tensors:
            assert {tensor.name for tensor in tensors} == {name for name in header.tensors if "norm" in name}
        with loader.tensors(model_path) as tensors:
            next(tensors)  # leaves early
        with pytest.raises(SourceNotFoundError):
            loader.load("/absent.gguf")
    with pytest.raises(ClosedError):
        loader.load(model_path)
    one = blocking.load(model_path, device="host", options=small, select="output_norm.weight")
    assert list(one) == ["output_norm.weight"]
    model.close()
    one.close()
    names = [thread.name for thread in threading.enumerate() if not thread.name.startswith("asyncload-reclaim")]
    assert len(names) <= before, names


def test_inside_a_running_loop(model_path: Path, small: Options) -> None:
    """As in a Jupyter cell: plain code, called on the thread of a running loop."""

    async def cell() -> int:
        return len(blocking.load(model_path, device="host", options=small))

    assert asyncio.run(cell()) == len(blocking.read_header(model_path).tensors)


def test_an_interrupt_ends_cleanly(model_path: Path, engine: EngineOption) -> None:
    """Ctrl-C in the middle of a load: KeyboardInterrupt, exit code 130 by convention of the caller, no other noise."""
    program = textwrap.dedent(
        """
        import os, signal, sys, threading
        from asyncload import blocking
        from asyncload.device import HostDevice
        from asyncload.options import Options
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started deaf to it
        options = Options(engine=sys.argv[2], chunk_size=64 << 10, staging=256 << 10, threads=2)
        device = HostDevice(bandwidth=2e6)
        def interrupt(progress):
            if progress.stage == "start":
                os.kill(os.getpid(), signal.SIGINT)
        try:
            with blocking.Loader(device, options=options) as loader:
                loader.load(sys.argv[1], progress=interrupt)
        except KeyboardInterrupt:
            left = [t.name for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]
            print("interrupted", left)
            sys.exit(130)
        """
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(model_path), engine],
        capture_output=True,
        text=True,
        timeout=100,
        env=environment,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "interrupted []\n", "")
