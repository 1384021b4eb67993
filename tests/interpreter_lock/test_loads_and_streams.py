"""Who waits for a load, or takes from a stream, comes to the interpreter lock."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import anyio
import pytest

from asyncload import Loader, read_header
from asyncload.errors import PlanError
from asyncload.layers import Scheduler
from asyncload.loader import _layer_stream, _session
from asyncload.loader._open import OpenedModel
from asyncload.loader._session import Session
from asyncload.plan import Mode
from asyncload.source import open_source
from asyncload.testing import AsyncOnlySource


def intervals_at(owner: object, name: str, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The switch intervals at each call of a function."""
    intervals, function = list[float](), getattr(owner, name)

    def note(*args: Any, **options: Any) -> Any:
        intervals.append(sys.getswitchinterval())
        return function(*args, **options)

    monkeypatch.setattr(owner, name, note)
    return intervals


@pytest.mark.anyio
async def test_loads_wait_and_give_the_interval_back(
    interval: float, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work, on_the_loop = intervals_at(Session, "make_plan", monkeypatch), list[float]()
    async with Loader("host") as loader:

        async def load(dtype: str) -> None:
            model = await loader.load(path, dtype=dtype, progress=lambda _: on_the_loop.append(sys.getswitchinterval()))
            model.close()

        await load("packed")
        assert set(on_the_loop) == {0.0005}
        assert sys.getswitchinterval() == interval
        with pytest.raises(PlanError):
            await load("int3")
    assert at_work == [0.0005, 0.0005]
    assert sys.getswitchinterval() == interval


@pytest.mark.anyio
async def test_so_does_who_waits_for_the_end_of_a_load_that_fails(
    interval: float, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_the_end = intervals_at(Session, "_discard", monkeypatch)
    async with Loader("host") as loader:
        with pytest.raises(PlanError):
            await loader.load(path, dtype="int3")
    assert at_the_end == [0.0005]
    assert sys.getswitchinterval() == interval


@pytest.mark.anyio
async def test_and_for_a_header(interval: float, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_work = intervals_at(OpenedModel, "_join", monkeypatch)
    await read_header(path)
    assert at_work == [0.0005]
    assert sys.getswitchinterval() == interval


STREAM: Final[list[Mode]] = ["stream"]
PLANS: Final = {"tensors": (_session, "plan_load"), "layers": (_layer_stream, "plan_memory")}  # where they are made
ENDS: Final = {"tensors": (Session, "discard"), "layers": (Scheduler, "close")}  # what leaving begins with


class Gate(AsyncOnlySource):
    """A source that gives nothing as long as it is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__(open_source(path))
        self.opened = anyio.Event()
        self.opened.set()

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        await self.opened.wait()
        await super().read_into(offset, buffer)


@asynccontextmanager
async def consumer(loader: Loader, gate: Gate, kind: str) -> AsyncGenerator[AsyncIterator[object]]:
    """Something that is iterated over, of which not everything comes before the gate is open."""
    if kind == "tensors":
        async with loader.tensors(gate, ahead=1) as tensors:
            gate.opened = anyio.Event()
            yield tensors
    else:
        async with loader.stream(gate, allow=STREAM, host="file") as layers:
            gate.opened = anyio.Event()
            yield aiter(layers)


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["tensors", "layers"])
async def test_who_enters_a_stream_waits(
    interval: float, path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    at_work = intervals_at(*PLANS[kind], monkeypatch)
    gate = Gate(path)
    gate.opened = anyio.Event()
    async with Loader("host") as loader, anyio.create_task_group() as group:

        async def enter() -> None:
            async with consumer(loader, gate, kind):
                assert sys.getswitchinterval() == interval

        group.start_soon(enter)
        await anyio.wait_all_tasks_blocked()
        assert sys.getswitchinterval() == 0.0005
        gate.opened.set()
    assert at_work[0] == 0.0005


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["tensors", "layers"])
async def test_who_leaves_a_stream_waits(
    interval: float, path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    seen = intervals_at(*ENDS[kind], monkeypatch)
    gate = Gate(path)
    async with Loader("host") as loader:
        async with consumer(loader, gate, kind):
            gate.opened.set()
        assert seen == [0.0005]
        assert sys.getswitchinterval() == interval


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["tensors", "layers"])
async def test_who_takes_from_a_stream_waits(interval: float, path: Path, kind: str) -> None:
    gate, meanwhile = Gate(path), set[float]()
    async with Loader("host") as loader, consumer(loader, gate, kind) as source, anyio.create_task_group() as group:
        assert sys.getswitchinterval() == interval

        async def take() -> None:
            async for _ in source:
                meanwhile.add(sys.getswitchinterval())

        group.start_soon(take)
        await anyio.wait_all_tasks_blocked()
        assert sys.getswitchinterval() == 0.0005
        gate.opened.set()
    assert meanwhile == {interval}
    assert sys.getswitchinterval() == interval


@pytest.mark.anyio
async def test_who_uses_a_layer_waits(interval: float, path: Path) -> None:
    """For the lock, if for nothing else: what he calls to begin his work gives it up."""
    inside, outside = set[float](), set[float]()
    async with Loader("host") as loader, loader.stream(path, allow=STREAM, host="slabs") as layers:
        async for layer in layers:
            outside.add(sys.getswitchinterval())
            with suppress(ZeroDivisionError), layer.on():
                inside.add(sys.getswitchinterval())
                _ = 1 // layer.number  # however it ends
            outside.add(sys.getswitchinterval())
    assert (inside, outside) == ({0.0005}, {interval})
