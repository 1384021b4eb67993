from __future__ import annotations

import pytest

from asyncload.options import Options
from asyncload.pipeline import LoadStats, StageStats
from asyncload.pipeline._stats import Stats


def stats(read: float, decode: float, upload: float) -> LoadStats:
    stages = {
        name: StageStats(seconds=share * workers, nbytes=100, workers=workers, utilization=share)
        for name, share, workers in (("read", read, 4), ("decode", decode, 4), ("upload", upload, 1))
    }
    return LoadStats(wall=1.0, stages=stages, nbytes=200, retries=0, reading="not at all")


@pytest.mark.parametrize(
    ("read", "decode", "upload", "bottleneck"),
    [(0.9, 0.0, 0.5, "read"), (0.1, 0.8, 0.5, "decode"), (0.4, 0.3, 0.95, "upload"), (0.5, 0.4, 0.6, "read")],
)
def test_the_busiest_stage_is_the_bottleneck(read: float, decode: float, upload: float, bottleneck: str) -> None:
    assert stats(read, decode, upload).bottleneck == bottleneck


def test_copies_that_overlap_count_once() -> None:
    collected = Stats(Options(threads=2), "by a test")
    begin = collected._begin
    collected.uploaded(begin + 1.0, begin + 2.0, 10, 40)
    collected.uploaded(begin + 1.5, begin + 2.5, 10, 40)
    collected.uploaded(begin + 4.0, begin + 5.0, 10, 10)
    result = collected.result()
    assert result.stages["upload"].seconds == pytest.approx(2.5)
    assert result.bytes_uploaded == 30
    assert result.nbytes == 90
    assert result.rate == result.nbytes / result.wall
    assert result.reading == "by a test"


def test_work_that_raises_counts_no_bytes() -> None:
    collected = Stats(Options(threads=2), "by a test")
    with collected.working("read", 7):
        pass
    with pytest.raises(LookupError), collected.working("read", 7):
        raise LookupError
    assert collected.result().bytes_read == 7
