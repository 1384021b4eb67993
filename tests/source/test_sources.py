from __future__ import annotations

import errno
import gc
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from asyncload.errors import RangeError, SourceChangedError, SourceNotFoundError, SourceReadError
from asyncload.source import BlockingSource, MemorySource, Source, open_source
from asyncload.testing import AsyncOnlySource, LatencySource, ThrottledSource
from asyncload.threads import run_in_thread


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


DATA = bytes(range(256)) * 100


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "data"
    path.parent.mkdir()
    path.write_bytes(DATA)
    return path


class TestEverySource:
    @pytest.fixture(
        params=[
            "file",
            pytest.param("native", marks=pytest.mark.native),
            "memory",
            "async only",
            "latency",
            "throttled",
        ]
    )
    def source(self, request: pytest.FixtureRequest, path: Path) -> Any:
        file = open_source(path, native=request.param == "native")
        sources: dict[str, Source] = {
            "file": file,
            "native": file,
            "memory": MemorySource(DATA),
            "async only": AsyncOnlySource(file),
            "latency": LatencySource(file, 0.0),
            "throttled": ThrottledSource(file, 1e12),
        }
        yield sources[request.param]
        file.close()

    @pytest.mark.anyio
    @pytest.mark.parametrize(("offset", "nbytes"), [(0, 0), (0, 1), (1, 255), (len(DATA) - 1, 1), (0, len(DATA))])
    async def test_a_read_gives_exactly_its_range(self, source: Source, offset: int, nbytes: int) -> None:
        buffer = bytearray(nbytes)
        await source.read_into(offset, memoryview(buffer))
        assert bytes(buffer) == DATA[offset : offset + nbytes]
        if isinstance(source, BlockingSource):
            again = bytearray(nbytes)
            await run_in_thread(source.read_into_blocking, offset, memoryview(again))
            assert again == buffer

    @pytest.mark.anyio
    @pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (0, len(DATA) + 1), (len(DATA), 1)])
    async def test_a_range_outside_is_refused_and_nothing_moves(self, source: Source, offset: int, nbytes: int) -> None:
        buffer = bytearray(b"?" * nbytes)
        with pytest.raises(RangeError) as caught:
            await source.read_into(offset, memoryview(buffer))
        assert (caught.value.offset, caught.value.nbytes, caught.value.limit) == (offset, nbytes, len(DATA))
        assert bytes(buffer) == b"?" * nbytes

    def test_it_says_what_it_is(self, source: Source) -> None:
        assert source.size == len(DATA)
        assert source.url
        assert source.identity == source.identity


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.native)], ids=["python", "native"])
def native(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


class TestAFile:
    def test_short_reads_are_continued(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = os.preadv

        def short(fd: int, buffers: list[memoryview], offset: int) -> int:
            return whole(fd, [buffers[0][:100]], offset)

        monkeypatch.setattr(os, "preadv", short)
        source = open_source(path, native=False)
        buffer = bytearray(1234)
        source.read_into_blocking(7, memoryview(buffer))
        assert bytes(buffer) == DATA[7 : 7 + 1234]
        source.close()

    @pytest.mark.parametrize("change", ["grown", "truncated", "touched", "replaced", "removed", "without its folder"])
    def test_one_that_changes_is_noticed(self, path: Path, change: str, native: bool) -> None:
        source = open_source(path, native=native)
        match change:
            case "grown":
                os.truncate(path, len(DATA) + 4)
            case "truncated":
                os.truncate(path, 50)
            case "touched":
                os.utime(path, ns=(1, 1))
            case "replaced":
                other = path.with_name("other")
                other.write_bytes(DATA)
                other.rename(path)
            case "removed":
                path.unlink()
            case _:
                path.parent.rename(path.parent.with_name("away"))
                path.parent.write_bytes(b"")
        with pytest.raises(SourceChangedError, match="changed while it was being loaded"):
            source.read_into_blocking(0, memoryview(bytearray(100)))
        source.close()

    def test_a_missing_one_is_named(self, tmp_path: Path, native: bool) -> None:
        with pytest.raises(SourceNotFoundError, match="absent") as caught:
            open_source(tmp_path / "absent", native=native)
        assert isinstance(caught.value, FileNotFoundError)
        assert caught.value.url == str(tmp_path / "absent")

    def test_what_is_no_regular_file_is_refused_at_once(self, tmp_path: Path, native: bool) -> None:
        os.mkfifo(tmp_path / "fifo")
        for name in ("fifo", "."):
            with pytest.raises(SourceReadError, match="not a regular file"):
                open_source(tmp_path / name, native=native)

    @pytest.mark.parametrize(("number", "passing"), [(errno.EIO, True), (errno.EBADF, False)])
    def test_an_error_says_where_and_whether_it_may_pass(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, number: int, passing: bool
    ) -> None:
        def fail(fd: int, buffers: object, offset: int) -> int:
            raise OSError(number, "broken")

        source = open_source(path, native=False)
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(SourceReadError) as caught:
            source.read_into_blocking(42, memoryview(bytearray(1)))
        assert (caught.value.errno, caught.value.offset, caught.value.transient) == (number, 42, passing)
        assert isinstance(caught.value.__cause__, OSError)
        source.close()

    def test_where_it_cannot_be_looked_at_no_place_is_named(self, path: Path, native: bool) -> None:
        source = open_source(path, native=native)
        path.unlink()
        path.symlink_to(path)
        with pytest.raises(SourceReadError) as caught:
            source.read_into_blocking(42, memoryview(bytearray(1)))
        assert (caught.value.errno, caught.value.offset, caught.value.transient) == (errno.ELOOP, None, False)
        source.close()

    @pytest.mark.anyio
    async def test_the_event_loop_does_not_close_it(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, native: bool
    ) -> None:
        source, threads = open_source(path, native=native), list[int]()
        close = type(source).close

        def closing(closed: Any) -> None:
            threads.append(threading.get_ident())
            close(closed)

        monkeypatch.setattr(type(source), "close", closing)
        await source.aclose()
        assert len(threads) == 1
        assert threads[0] != threading.get_ident()

    def test_closing_gives_the_descriptor_back_once(self, path: Path, native: bool) -> None:
        gc.collect()  # files in the tracebacks of tests before
        before = descriptors()
        source = open_source(path, native=native)
        assert descriptors() == before + 1
        source.close()
        source.close()
        assert descriptors() == before
        with pytest.raises(SourceReadError):
            source.read_into_blocking(0, memoryview(bytearray(1)))
