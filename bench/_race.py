"""Loaders that load the same bytes in turns, some of them while Python threads spin."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import anyio.to_thread

from asyncload import Loader, Model
from asyncload.gguf import Header
from bench._load_check import Check
from bench._two_headers import Form, TwoHeaders
from bench.demo import download

__all__ = ["Contestant", "Line", "Race", "ours", "spinning", "theirs"]

_LARGEST_CHECKED: Final = 256 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Contestant:
    """A loader of a file.

    ``form`` is the header that it wants, ``load`` returns what came, ``content`` says a tensor's bytes of that, and
    ``free`` frees it. One that ``may_fail`` leaves the race when it does.
    """

    name: str
    form: Form
    load: Callable[[], Awaitable[Any]]
    content: Callable[[Any, str], bytes]
    free: Callable[[Any], Awaitable[None]]
    may_fail: bool = False


def ours(name: str, loader: Loader, file: TwoHeaders) -> Contestant:
    """Loads packed, with a loader that is entered."""

    async def free(model: Model) -> None:
        model.close()
        await anyio.to_thread.run_sync(loader.tracker.flush)

    return Contestant(
        name,
        "gguf",
        load=partial(loader.load, file.path),
        content=lambda model, tensor: download(loader.device, model[tensor]),
        free=free,
    )


def theirs(name: str, load: Callable[[], Mapping[str, Any]]) -> Contestant:
    """Loads with a function that returns tensors of torch's or numpy's."""

    async def run() -> dict[str, Any]:
        return dict(load())  # nobody else needs the loop

    async def free(tensors: dict[str, Any]) -> None:
        tensors.clear()

    return Contestant(name, "safetensors", load=run, content=_bytes_of, free=free, may_fail=True)


def _bytes_of(tensors: Mapping[str, Any], name: str) -> bytes:
    tensor = tensors[name]
    array = tensor.cpu().numpy() if hasattr(tensor, "cpu") else tensor
    data: bytes = array.tobytes()
    return data


@dataclass(slots=True)
class Line:
    """What a loader took for ``nbytes`` beside some spinning threads: seconds, and seconds of processor, each time.

    The processor's are those of all threads of the process, so they stay empty where others spin.
    """

    loader: str
    spinning: int
    nbytes: int
    runs: list[float] = field(default_factory=list[float])
    processor: list[float] = field(default_factory=list[float])
    check: Check | None = None

    @property
    def seconds(self) -> float:
        """The median of the runs."""
        return statistics.median(self.runs)

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.nbytes / self.seconds


@dataclass(slots=True)
class Race:
    """Loaders of one file, each with the numbers of threads that spin beside it, and what came of them.

    ``limit`` is measured before each round: the most bytes a second that the machine gives. ``patience`` is the seconds
    after which a line is not measured again. ``failed`` says why a loader has left the race.
    """

    file: TwoHeaders
    entries: Sequence[tuple[Contestant, int]]
    repeats: int
    patience: float
    limit: Callable[[], float]
    limits: list[float] = field(default_factory=list[float])
    lines: list[Line] = field(default_factory=list[Line])
    failed: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def limit_rate(self) -> float:
        """The highest of the limits: where the machine was slow for once, that was not its limit."""
        return max(self.limits)

    async def run(self) -> None:
        """Has all of them load in turns, after a first load of each that warms it."""
        lines = [Line(loader.name, threads, self.file.header.nbytes) for loader, threads in self.entries]
        for loader in {loader.name: loader for loader, _ in self.entries}.values():
            await self._turn(loader, None)
        for number in range(self.repeats):
            self.limits.append(await anyio.to_thread.run_sync(self.limit))
            turns = deque(zip(self.entries, lines, strict=True))
            turns.rotate(-number)  # nobody is always the first after a pause
            for (loader, _), line in turns:
                if loader.name not in self.failed and (not line.runs or sum(line.runs) < self.patience):
                    await self._turn(loader, line)
        self.lines = [line for line in lines if line.runs and line.loader not in self.failed]

    async def _turn(self, loader: Contestant, line: Line | None) -> None:
        """Loads once; without a line, to warm."""
        self.file.become(loader.form)
        try:
            loaded = await self._timed(loader, line) if line else await loader.load()
        except Exception as error:
            if not loader.may_fail:
                raise
            self.failed[loader.name] = f"{type(error).__name__}: {error}"
            return
        if line and line.check is None:
            line.check = self._check(loader, loaded)
        await loader.free(loaded)

    async def _timed(self, loader: Contestant, line: Line) -> Any:
        with spinning(line.spinning):
            processor, begin = time.process_time(), time.perf_counter()
            loaded = await loader.load()
            line.runs.append(time.perf_counter() - begin)
            if not line.spinning:
                line.processor.append(time.process_time() - processor)
        return loaded

    def _check(self, loader: Contestant, loaded: Any) -> Check:
        names = sample(self.file.header)
        different = [name for name in names if loader.content(loaded, name) != self.file.content(name)]
        return Check("the file", len(names), different)


def sample(header: Header) -> list[str]:
    """The first tensor of a file and its last, the smallest and the largest, but none that takes long to compare."""
    in_order = sorted(header.tensors.values(), key=lambda info: info.offset)
    small = [info for info in in_order if info.nbytes <= _LARGEST_CHECKED]
    by_size = sorted(small, key=lambda info: info.nbytes)
    return list(dict.fromkeys(info.name for info in (small[0], small[-1], by_size[0], by_size[-1])))


@contextmanager
def spinning(threads: int) -> Generator[None]:
    """Has threads spin in Python, which want the interpreter lock all the time."""
    stop: list[None] = []

    def spin() -> None:
        while not stop:
            pass

    spinners = [threading.Thread(target=spin, name="bench-spin") for _ in range(threads)]
    for spinner in spinners:
        spinner.start()
    try:
        yield
    finally:
        stop.append(None)
        for spinner in spinners:
            spinner.join()
