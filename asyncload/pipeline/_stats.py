"""Where a load's time went."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from asyncload.options import Options

__all__ = ["LoadStats", "StageStats", "Stats", "load_stats", "stage_workers"]


@dataclass(frozen=True, slots=True)
class StageStats:
    """One stage: ``seconds`` of work summed over its ``workers``, ``nbytes`` that came out, and its share of the wall.

    ``utilization`` is 1 when all workers of the stage were busy all the time.
    """

    seconds: float
    nbytes: int
    workers: int
    utilization: float


@dataclass(frozen=True, slots=True)
class LoadStats:
    """What a load took: ``wall`` seconds, ``stages`` by name (read, decode, upload), bytes, and retries of reads.

    ``nbytes`` are those of the tensors that landed. The stage "decode" is the host's; what the device decodes belongs
    to "upload", as its kernels run behind the copies. ``reading`` says, for people, how the sources were read, and why.
    """

    wall: float
    stages: dict[str, StageStats]
    nbytes: int
    retries: int
    reading: str

    @property
    def bytes_read(self) -> int:
        """Bytes that came from the source."""
        return self.stages["read"].nbytes

    @property
    def bytes_uploaded(self) -> int:
        """Bytes that crossed the bus."""
        return self.stages["upload"].nbytes

    @property
    def rate(self) -> float:
        """Bytes of tensors that landed a second."""
        return self.nbytes / self.wall if self.wall > 0 else 0.0

    @property
    def bottleneck(self) -> str:
        """The stage whose workers were busiest; read and decode share theirs, so the larger stands for both."""
        read, decode, upload = (self.stages[name] for name in ("read", "decode", "upload"))
        if upload.utilization >= read.utilization + decode.utilization:
            return "upload"
        return "decode" if decode.seconds > read.seconds else "read"


def load_stats(  # noqa: PLR0917 - the sums, each once
    wall: float,
    workers: Mapping[str, int],
    seconds: Mapping[str, float],
    nbytes: Mapping[str, int],
    landed: int,
    retries: int,
    reading: str,
) -> LoadStats:
    """A load's figures out of the sums for each stage."""
    stages = {
        stage: StageStats(seconds[stage], nbytes[stage], count, seconds[stage] / (wall * count) if wall else 0.0)
        for stage, count in workers.items()
    }
    return LoadStats(wall, stages, landed, retries, reading)


def stage_workers(options: Options) -> dict[str, int]:
    """How many threads work at each stage; copies overlap, so that one stands for all of their streams."""
    return {"read": options.threads, "decode": options.threads, "upload": 1}


class Stats:
    """Collects a load's figures; thread-safe. ``reading`` says how its sources are read."""

    def __init__(self, options: Options, reading: str) -> None:
        self._lock = threading.Lock()
        self._begin = begin = time.perf_counter()
        self._workers = stage_workers(options)
        self._seconds = dict.fromkeys(self._workers, 0.0)
        self._nbytes = dict.fromkeys(self._workers, 0)
        self._upload_until = begin
        self._landed = 0
        self._reading = reading
        self.retries = 0

    @contextmanager
    def working(self, stage: str, nbytes: int) -> Generator[None]:
        """Counts the time of the block, and, if it does not raise, ``nbytes`` bytes, to a stage."""
        begin = time.perf_counter()
        yield
        with self._lock:
            self._seconds[stage] += time.perf_counter() - begin
            self._nbytes[stage] += nbytes

    def uploaded(self, begin: float, end: float, nbytes: int, landed: int) -> None:
        """Counts copies of ``nbytes``, which became ``landed`` bytes of tensors.

        They were under way from ``begin`` to ``end`` (``time.perf_counter``).
        """
        with self._lock:
            # copies of several streams overlap: what counts is the time in which at least one was under way
            self._seconds["upload"] += max(0.0, end - max(begin, self._upload_until))
            self._upload_until = max(self._upload_until, end)
            self._nbytes["upload"] += nbytes
            self._landed += landed

    def retried(self) -> None:
        """Counts a read that is made again."""
        self.retries += 1

    def result(self) -> LoadStats:
        """The figures until now."""
        with self._lock:
            wall = time.perf_counter() - self._begin
            sums = self._seconds, self._nbytes, self._landed, self.retries
            return load_stats(wall, self._workers, *sums, self._reading)
