from __future__ import annotations

import logging

import anyio
import anyio.lowlevel
import pytest

from asyncload.errors import SourceReadError
from asyncload.events import Progress, ProgressStream
from asyncload.telemetry import ProgressMeter


def progress(stage: str = "load", done: int = 5, total: int = 10, resumed: int = 0, elapsed: float = 2.0) -> Progress:
    return Progress(
        stage=stage,  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
        bytes_done=done,
        bytes_total=total,
        bytes_resumed=resumed,
        tensors_done=0,
        tensors_total=1,
        elapsed=elapsed,
    )


class TestProgress:
    def test_rate_and_time_left(self) -> None:
        event = progress(done=6, total=10)
        assert event.rate == 3.0
        assert event.remaining == pytest.approx(4 / 3)
        assert progress(done=6, resumed=4).rate == 1.0, "what was resumed was not moved"
        assert progress(done=0).remaining is None
        assert progress(elapsed=0.0).rate == 0.0

    def test_only_the_end_is_one_hundred_percent(self) -> None:
        assert progress(done=10, total=10).fraction < 1
        assert progress("done", done=10, total=10).fraction == 1
        assert progress("start", done=0, total=0).fraction == 0


class TestTheLog:
    def lines(self, caplog: pytest.LogCaptureFixture, total: int, step: int) -> list[str]:
        with caplog.at_level(logging.INFO, "asyncload.load"):
            meter = ProgressMeter("model", nbytes=total, tensors=1)
            meter.start()
            for _ in range(0, total, step):
                meter.chunk(step)
            meter.tensors(1)
            meter.done()
        return [record.getMessage() for record in caplog.records]

    def test_above_one_gigabyte_each_tenth_has_a_line(self, caplog: pytest.LogCaptureFixture) -> None:
        lines = self.lines(caplog, 2_000_000_000, 50_000_000)
        assert [line.split(",")[0] for line in lines[1:-1]] == [f"model: {tenth}0 %" for tenth in range(1, 10)]
        assert "loading 1 tensors, 1.9 GiB" in lines[0]
        assert "loaded 1.9 GiB in" in lines[-1]

    def test_a_step_over_several_tenths_has_one_line(self, caplog: pytest.LogCaptureFixture) -> None:
        lines = self.lines(caplog, 2_000_000_000, 500_000_000)
        assert [line.split(",")[0] for line in lines[1:-1]] == ["model: 20 %", "model: 50 %", "model: 70 %"]

    def test_below_it_only_start_and_end(self, caplog: pytest.LogCaptureFixture) -> None:
        assert len(self.lines(caplog, 900_000_000, 100_000_000)) == 2

    def test_a_failure_is_a_warning_and_a_cancellation_is_not(self, caplog: pytest.LogCaptureFixture) -> None:
        meter = ProgressMeter("model", nbytes=10, tensors=1)
        with caplog.at_level(logging.INFO, "asyncload.load"):
            meter.failed(SourceReadError("broken", url="x"))
            meter.failed(KeyboardInterrupt())
        assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.INFO]


@pytest.mark.anyio
class TestProgressStream:
    async def test_one_that_falls_behind_keeps_the_latest(self) -> None:
        stream = ProgressStream(limit=3)
        for done in range(10):
            stream(progress(done=done))
        stream(progress("done", done=10))
        assert [event.bytes_done async for event in stream] == [8, 9, 10]

    async def test_it_waits_for_the_next_event(self) -> None:
        stream = ProgressStream()
        seen: list[int] = []

        async def watch() -> None:
            seen.extend([event.bytes_done async for event in stream])

        async with anyio.create_task_group() as group:
            group.start_soon(watch)
            await anyio.lowlevel.checkpoint()
            stream(progress(done=1))
            await anyio.lowlevel.checkpoint()
            stream.close()
        assert seen == [1]
