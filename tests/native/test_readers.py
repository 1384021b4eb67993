"""All ways of reading a file give its bytes or say what is wrong."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncload.gguf import GGMLType
from asyncload.options import Options
from asyncload.source._file import _PASSING
from asyncload.testing import write_gguf

if TYPE_CHECKING:
    from asyncload_native import File, Race, ReaderChoice, Strategy

pytestmark = pytest.mark.native

ATTEMPTS = 5  # to have the page cache as a test needs it
SIZE = (5 << 20) + 1234  # more than one ring takes at once, and no multiple of anything

every_strategy = pytest.mark.parametrize(
    "strategy",
    [
        "PREAD",
        pytest.param("DIRECT", marks=pytest.mark.direct),
        pytest.param("URING", marks=pytest.mark.uring),
        pytest.param("URING_DIRECT", marks=[pytest.mark.uring, pytest.mark.direct]),
    ],
)


def share(path: Path) -> File:
    from asyncload_native import File

    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead: what was not read is not cached
        return File.share(str(path), descriptor)
    finally:
        os.close(descriptor)


def read(file: File, offset: int, buffer: Any, strategy: str) -> None:
    from asyncload_native import Strategy
    from asyncload_native import read as native_read

    native_read(file, offset, buffer, Strategy[strategy])


def reason(path: Path, strategy: str) -> str | None:
    from asyncload_native import Strategy, unavailable

    return unavailable(Strategy[strategy], share(path))


def aligned(nbytes: int, shift: int = 0) -> Any:
    """Bytes at an address that leaves ``shift`` by the size of a page."""
    memory = np.full(nbytes + shift + mmap.PAGESIZE, 0xEE, np.uint8)
    start = -memory.ctypes.data % mmap.PAGESIZE + shift
    return memory[start : start + nbytes]


def descriptors() -> int:
    gc.collect()  # files in the tracebacks of tests before
    return len(list(Path("/proc/self/fd").iterdir()))


def leave_the_page_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(path: Path) -> float:
    """How much of a file the page cache has: asked without bringing any of it in."""
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
        content = np.frombuffer(pages, np.uint8)
        found = np.zeros(-(-content.nbytes // mmap.PAGESIZE), np.uint8)
        asked = mincore(content.ctypes.data, content.nbytes, found.ctypes.data)
        del content  # it keeps the mapping
    assert asked == 0
    return float((found & 1).mean())


def need_on_disk_only(path: Path) -> None:
    """Has a file out of the page cache, or skips: the system only takes a hint, and some file systems have no disk."""
    for _ in range(ATTEMPTS):
        leave_the_page_cache(path)
        if cached_share(path) == 0:
            return
        time.sleep(0.01)
    pytest.skip(f"needs disk: the page cache keeps files in {path.parent}")


def in_page_cache(path: Path, attempt: Callable[[], bool]) -> None:
    """Has something shown of a file in the page cache; again, as the system may take pages away meanwhile, or skips."""
    cached = 0
    for _ in range(ATTEMPTS):
        path.read_bytes()
        if cached_share(path) < 1:
            continue
        if attempt():
            return
        cached += 1
    assert not cached, f"it is not so, though the page cache had the file {cached} times"
    pytest.skip(f"needs memory: the page cache does not keep {path.stat().st_size} bytes")


@pytest.fixture(scope="module")
def data() -> bytes:
    return np.random.default_rng(1).bytes(SIZE)


@pytest.fixture
def path(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "folder" / "data"
    path.parent.mkdir()
    path.write_bytes(data)
    return path


def near(multiple: int, most: int) -> st.SearchStrategy[int]:
    """Numbers at multiples of something, and beside them."""

    def place(times: int, beside: int) -> int:
        return min(max(times * multiple + beside, 0), most)

    return st.builds(place, st.integers(0, most // multiple), st.sampled_from([0, 0, -1, 1, 32]))


@every_strategy
class TestEveryStrategy:
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        place=st.tuples(
            st.one_of(st.integers(0, SIZE), near(4096, SIZE), near(512, SIZE)),
            st.one_of(st.integers(0, SIZE), st.integers(0, 9000), near(512 << 10, SIZE), near(4096, SIZE)),
        ),
        address=st.one_of(st.just(0), st.integers(0, 4095), st.none()),
    )
    def test_a_read_gives_exactly_its_range(
        self, path: Path, data: bytes, strategy: str, place: tuple[int, int], address: int | None
    ) -> None:
        offset, nbytes = place
        nbytes = min(nbytes, SIZE - offset)
        memory = aligned(nbytes + 128, ((offset if address is None else address) - 64) % 4096)
        read(share(path), offset, memory[64 : 64 + nbytes], strategy)
        assert memory[64 : 64 + nbytes].tobytes() == data[offset : offset + nbytes]
        assert set(memory[:64].tobytes() + memory[64 + nbytes :].tobytes()) == {0xEE}

    @pytest.mark.parametrize("cached", [True, False])
    def test_what_the_page_cache_has_and_what_not(self, path: Path, data: bytes, strategy: str, cached: bool) -> None:
        if not cached:
            leave_the_page_cache(path)
        memory = aligned(SIZE)
        read(share(path), 0, memory, strategy)
        assert memory.tobytes() == data

    @pytest.mark.parametrize("before", [0, 1, 1000, 4096, SIZE])
    def test_a_file_that_ends_inside_the_range_is_no_success(self, path: Path, strategy: str, before: int) -> None:
        from asyncload_native import ReadError

        with pytest.raises(ReadError, match=rf"data: the file ended at byte {SIZE}$") as caught:
            read(share(path), SIZE - before, aligned(before + 1), strategy)
        assert (caught.value.kind, caught.value.offset, caught.value.transient) == ("ended", SIZE, False)

    @pytest.mark.parametrize("offset", [0, SIZE - 4096])
    @pytest.mark.parametrize("change", ["truncated", "written", "replaced", "removed", "folder replaced"])
    def test_a_file_that_changes_is_noticed(self, path: Path, strategy: str, change: str, offset: int) -> None:
        from asyncload_native import ReadError

        file = share(path)
        if change == "truncated":
            os.truncate(path, SIZE // 2)
        elif change == "written":
            path.write_bytes(b"?" * SIZE)
            os.utime(path, (1, 1))
        elif change == "replaced":
            other = path.with_name("other")
            other.write_bytes(b"?" * SIZE)
            other.replace(path)
        else:
            path.unlink()
        if change == "folder replaced":
            path.parent.rmdir()
            path.parent.write_bytes(b"")
        with pytest.raises(ReadError, match=r"data: the file changed while it was being loaded$") as caught:
            read(file, offset, aligned(4096), strategy)
        assert caught.value.kind == "changed"
        assert not caught.value.transient

    @pytest.mark.parametrize("_attempt", range(5))
    def test_after_a_failure_nothing_writes_to_the_buffer(self, path: Path, strategy: str, _attempt: int) -> None:
        """A page that may not be written fails one request, while others wait for the disk."""
        from asyncload_native import ReadError

        leave_the_page_cache(path)
        nbytes = 4 << 20
        memory = mmap.mmap(-1, nbytes)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        buffer = np.frombuffer(memory, np.uint8)
        assert protect(address, mmap.PAGESIZE, mmap.PROT_READ) == 0
        try:
            with pytest.raises(ReadError, match="Bad address") as caught:
                read(share(path), 0, buffer, strategy)
            before = buffer[:: mmap.PAGESIZE].copy()  # quickly: the disk takes a millisecond
        finally:
            assert protect(address, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE) == 0
        assert (caught.value.kind, caught.value.errno, caught.value.transient) == ("failed", errno.EFAULT, False)
        leave_the_page_cache(path)
        path.read_bytes()  # the disk has answered by then
        assert (buffer[:: mmap.PAGESIZE] == before).all()

    def test_signals_do_not_end_a_read(self, path: Path, data: bytes, strategy: str) -> None:
        stop, reader = threading.Event(), threading.main_thread().ident
        assert reader is not None
        hits: list[int] = []
        before = signal.signal(signal.SIGUSR1, lambda number, _: hits.append(number))
        interrupter = threading.Thread(target=interrupt, args=(reader, stop))
        interrupter.start()
        try:
            while len(hits) < 20:
                leave_the_page_cache(path)
                memory = aligned(SIZE)
                read(share(path), 0, memory, strategy)
                assert memory.tobytes() == data
        finally:
            stop.set()
            interrupter.join()
            signal.signal(signal.SIGUSR1, before)

    def test_many_threads_read_one_file(self, path: Path, data: bytes, strategy: str) -> None:
        file, step = share(path), 100_003
        wrong: list[int] = []

        def work(first: int) -> None:
            memory = aligned(step)
            for offset in range(first * step, SIZE - step, 4 * step):
                read(file, offset, memory, strategy)
                if memory.tobytes() != data[offset : offset + step]:
                    wrong.append(offset)

        run_threads(work, 4)
        assert wrong == []

    def test_descriptors_are_closed(self, path: Path, strategy: str) -> None:
        before = descriptors()
        file = share(path)
        read(file, 0, aligned(4096), strategy)
        del file
        assert descriptors() == before


def interrupt(thread: int, stop: threading.Event) -> None:
    while not stop.is_set():
        signal.pthread_kill(thread, signal.SIGUSR1)
        time.sleep(0.0001)


def run_threads(work: Callable[[int], None], count: int) -> None:
    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(work, number) for number in range(count)]:
            future.result()


def test_the_same_failures_pass_by_themselves_in_both_engines() -> None:
    from asyncload_native import is_transient

    assert {number for number in range(-1, 4096) if is_transient(number)} == _PASSING


@pytest.mark.parametrize("what", ["folder", "closed"])
def test_what_is_no_open_regular_file_is_refused(tmp_path: Path, what: str) -> None:
    from asyncload_native import File, ReadError

    descriptor = os.open(tmp_path, os.O_RDONLY)
    if what == "closed":
        os.close(descriptor)
    try:
        with pytest.raises(ReadError, match="not a regular file" if what == "folder" else "Bad file descriptor"):
            File.share(str(tmp_path), descriptor)
    finally:
        if what == "folder":
            os.close(descriptor)


# --- what a system does not have ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["DIRECT", "URING_DIRECT"])
@pytest.mark.uring
def test_a_file_system_without_direct_io_is_named_as_the_reason(strategy: str) -> None:
    from asyncload_native import ReadError

    path = Path("/proc/version")  # a regular file, of which the system refuses that
    assert reason(path, strategy) == "no direct I/O: Invalid argument"
    assert reason(path, "PREAD") is None
    with pytest.raises(ReadError, match="no direct I/O: Invalid argument") as caught:
        read(share(path), 0, aligned(5), strategy)
    assert caught.value.errno == errno.EINVAL


REFUSE = """
import ctypes, struct, sys

# a filter as containers have it: one system call answers "not permitted"
LOAD, JUMP_IF_EQUAL, RETURN, ALLOW, ERRNO = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050000
rules = [(LOAD, 0, 0, 0), (JUMP_IF_EQUAL, 0, 1, {number}), (RETURN, 0, 0, ERRNO | 1), (RETURN, 0, 0, ALLOW)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
program = struct.pack("HxxxxxxP", len(rules), ctypes.addressof(code))
prctl = ctypes.CDLL(None).prctl
assert prctl(38, 1, 0, 0, 0) == 0  # no new privileges
assert prctl(22, 2, ctypes.create_string_buffer(program), 0, 0) == 0  # a seccomp filter
"""
READ = """
import os, numpy
from asyncload_native import File, ReaderChoice, Strategy, unavailable

descriptor = os.open(sys.argv[1], os.O_RDONLY)
file = File.share(sys.argv[1], descriptor)
print(unavailable(Strategy.URING, file))
choice, buffer = ReaderChoice([file]), numpy.ones(4 << 20, numpy.uint8)
choice.read(file, 0, buffer)
print(buffer.sum())
print(choice.reason)
"""


@pytest.mark.parametrize("call", [425, 426], ids=["io_uring_setup", "io_uring_enter"])
@pytest.mark.uring
def test_a_process_that_may_not_use_io_uring_reads_otherwise(large: Path, call: int) -> None:
    need_on_disk_only(large)
    code = REFUSE.replace("{number}", str(call)) + READ
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", code, large], capture_output=True, text=True, check=True, env=environment
    )
    why, total, choice = result.stdout.splitlines()
    assert why == "no io_uring: Operation not permitted"
    assert int(total) == ord("7") * CHUNK
    assert f"uring ({why})" in choice
    assert f"uring-direct ({why})" in choice


# --- the choice -----------------------------------------------------------------------------------------------------

CHUNK = 4 << 20
LARGE = 128 << 20


def take(race: Race) -> Strategy:
    """Has the next chunk read by whose turn it is."""
    strategy = race.next()
    race.give(strategy, CHUNK)
    return strategy


class TestTheRace:
    @pytest.fixture
    def race(self) -> Race:
        from asyncload_native import Race

        return Race()

    def run(self, race: Race, rates: dict[str, float]) -> list[str]:
        """Chunks by one thread until there is a winner, at these rates in GB/s; who read them."""
        order: list[str] = []
        while race.winner is None:
            strategy = take(race)
            race.report(strategy, CHUNK, CHUNK / (rates[strategy.name] * 1e9))
            order.append(strategy.name)
        return order

    def test_all_read_as_much_one_after_the_other(self, race: Race) -> None:
        order = self.run(race, {"PREAD": 1, "DIRECT": 2, "URING": 3, "URING_DIRECT": 4})
        chunks = race.distance // CHUNK
        assert order == [name for name in ("PREAD", "DIRECT", "URING", "URING_DIRECT") for _ in range(chunks)]

    @given(st.lists(st.floats(0.01, 60), min_size=4, max_size=4))
    def test_the_fastest_wins_if_it_is_clearly_faster_than_pread(self, rates: list[float]) -> None:
        from asyncload_native import Race

        race = Race()
        named = dict(zip(["PREAD", "DIRECT", "URING", "URING_DIRECT"], rates, strict=True))
        self.run(race, named)
        assert race.winner is not None
        best = max(named, key=lambda name: named[name])
        clearly = named[best] / named["PREAD"]
        if clearly < race.margin * 0.999:
            assert race.winner.name == "PREAD"
        elif clearly > race.margin * 1.001:
            assert named[race.winner.name] == pytest.approx(named[best])
        assert race.next() == race.winner

    def test_nobody_waits_for_a_slow_one_twice(self, race: Race) -> None:
        """Threads that come while the last chunks of the race are being read take what is fastest so far."""
        given = [take(race) for _ in range(4 * race.distance // CHUNK)]
        for strategy in given:
            if strategy.name != "DIRECT":
                race.report(strategy, CHUNK, 2.0 if strategy.name == "PREAD" else 1.0)
        assert race.winner is None
        assert {take(race).name for _ in range(8)} == {"URING"}

    def test_what_cannot_be_used_takes_no_part(self, race: Race) -> None:
        from asyncload_native import Strategy

        race.drop(Strategy.DIRECT, "no direct I/O")
        race.drop(Strategy.URING_DIRECT, "no direct I/O")
        assert set(self.run(race, {"PREAD": 1, "URING": 2})) == {"PREAD", "URING"}
        assert race.describe() == (
            "uring: pread 1.00 GB/s a thread, direct (no direct I/O), uring 2.00 GB/s a thread, "
            "uring-direct (no direct I/O)"
        )

    def test_pread_alone_wins_without_a_race(self, race: Race) -> None:
        from asyncload_native import Strategy

        for strategy in (Strategy.DIRECT, Strategy.URING, Strategy.URING_DIRECT):
            race.drop(strategy, "no")
        assert race.winner is Strategy.PREAD
        assert race.describe() == "pread: direct (no), uring (no), uring-direct (no)"

    def test_a_winner_that_fails_makes_room_for_the_next(self, race: Race) -> None:
        from asyncload_native import Strategy

        self.run(race, {"PREAD": 1, "DIRECT": 4, "URING": 2, "URING_DIRECT": 3})
        winners = [race.winner]
        race.drop(Strategy.DIRECT, "Invalid argument")
        winners.append(race.winner)
        assert winners == [Strategy.DIRECT, Strategy.URING_DIRECT]

    def test_before_the_end_it_is_undecided(self, race: Race) -> None:
        race.report(take(race), CHUNK, CHUNK / 2e9)
        assert race.describe() == "undecided: pread 2.00 GB/s a thread"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file of more than a race takes, all ``7``; no holes, as the page cache has these without a disk."""
    path = tmp_path_factory.mktemp("readers") / "large"
    path.write_bytes(b"7" * LARGE)
    yield path
    path.unlink()


def read_through(choice: ReaderChoice, file: File, *, first: int = 0, step: int = 1) -> None:
    """Reads the large file in chunks, each ``step``th."""
    for offset in range(first * CHUNK, LARGE, step * CHUNK):
        buffer = aligned(CHUNK)
        choice.read(file, offset, buffer)
        assert (buffer == ord("7")).all()


class TestTheChoice:
    @pytest.mark.nowait
    def test_what_the_page_cache_has_is_read_by_pread_without_a_race(self, large: Path) -> None:
        from asyncload_native import ReaderChoice

        file = share(large)

        def attempt() -> bool:
            choice = ReaderChoice([file])
            before = descriptors()
            read_through(choice, file)
            if choice.reason != "pread: in the page cache":
                return False
            assert descriptors() == before, "nothing else was tried"
            return True

        in_page_cache(large, attempt)

    def test_small_files_are_read_by_pread_without_a_race(self, path: Path, data: bytes) -> None:
        from asyncload_native import ReaderChoice

        leave_the_page_cache(path)
        file, buffer = share(path), aligned(SIZE)
        choice = ReaderChoice([file])
        assert choice.reason == "nothing read"
        choice.read(file, 0, buffer)
        assert buffer.tobytes() == data
        assert choice.reason == "pread: too small to measure"

    @pytest.mark.direct
    @pytest.mark.uring
    def test_the_disk_is_read_by_all_until_one_has_won(self, large: Path) -> None:
        from asyncload_native import ReaderChoice

        need_on_disk_only(large)
        file = share(large)
        choice = ReaderChoice([file])
        read_through(choice, file)
        winner, _, figures = choice.reason.partition(": ")
        assert winner in {"pread", "direct", "uring", "uring-direct"}
        assert [figure.split()[0] for figure in figures.partition(";")[0].split(", ")] == [
            "pread",
            "direct",
            "uring",
            "uring-direct",
        ]

    @pytest.mark.direct
    @pytest.mark.nowait
    @pytest.mark.uring
    def test_whoever_has_won_what_the_page_cache_has_is_read_by_pread(self, large: Path) -> None:
        from asyncload_native import ReaderChoice, Strategy

        need_on_disk_only(large)
        file = share(large)
        choice = ReaderChoice([file])
        seconds = {strategy: 0.1 if strategy is Strategy.DIRECT else 1.0 for strategy in Strategy}
        for offset in range(0, 16 * CHUNK, CHUNK):
            strategy = choice.choose(file, offset, CHUNK)
            assert strategy is not None
            choice.report(strategy, CHUNK, seconds[strategy])
        assert choice.reason.startswith("direct: ")
        assert choice.choose(file, 17 * CHUNK, CHUNK) is Strategy.DIRECT

        def choose_of_what_was_read() -> Strategy | None:
            read(file, 17 * CHUNK, aligned(CHUNK), "PREAD")
            return choice.choose(file, 17 * CHUNK, CHUNK)

        # several times, as the system may take pages away meanwhile
        assert any(choose_of_what_was_read() is None for _ in range(ATTEMPTS))
        assert choice.choose(file, 17 * CHUNK, CHUNK // 8) is None, "too small"
        assert choice.choose(file, 18 * CHUNK, CHUNK) is Strategy.DIRECT
        assert choice.reason.endswith("; 4 MiB in the page cache, read by pread")

    @pytest.mark.direct
    @pytest.mark.uring
    def test_threads_share_it(self, large: Path) -> None:
        from asyncload_native import ReaderChoice

        need_on_disk_only(large)
        file = share(large)
        choice = ReaderChoice([file])
        run_threads(lambda first: read_through(choice, file, first=first, step=4), 4)
        assert not choice.reason.startswith("undecided")

    @pytest.mark.direct
    @pytest.mark.uring
    def test_a_load_from_the_disk_is_whole_by_whomever_it_is_read(self, tmp_path: Path) -> None:
        from asyncload import blocking

        content = random.Random(0).randbytes(LARGE)
        path = write_gguf(tmp_path / "model.gguf", {"tensor": (GGMLType.I8, (LARGE,), content)})
        need_on_disk_only(path)
        model = blocking.load(path, device="host", options=Options(engine="native", threads=4))
        assert model["tensor"].numpy().tobytes() == content
        for name in ("pread", "direct", "uring", "uring-direct"):
            assert re.search(rf"[ ,]{name} [0-9.]+ GB/s", model.stats.reading)

    @pytest.mark.uring
    def test_a_strategy_that_fails_on_the_way_is_given_up_and_pread_reads(self, large: Path) -> None:
        from asyncload_native import ReaderChoice

        need_on_disk_only(large)
        file = share(large)
        choice = ReaderChoice([file])
        buffer = aligned(CHUNK)
        choice.read(file, 0, buffer)  # all strategies were there
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # no ring can be made any more
        try:
            read_through(choice, file)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert "uring (no io_uring: Too many open files)" in choice.reason
        assert "uring-direct (no io_uring: Too many open files)" in choice.reason

    def test_a_file_that_ended_or_changed_is_no_reason_to_try_otherwise(self, tmp_path: Path) -> None:
        from asyncload_native import ReaderChoice, ReadError

        path = tmp_path / "data"
        path.touch()
        os.truncate(path, LARGE)
        file = share(path)
        os.truncate(path, LARGE - CHUNK)
        with pytest.raises(ReadError) as caught:
            ReaderChoice([file]).read(file, LARGE - CHUNK, aligned(CHUNK))
        assert caught.value.kind == "changed"
