"""What the table of the native engine stands on: one file for two formats, races, spinning threads, goals."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np
import pytest
from safetensors import numpy as safetensors

from asyncload.blocking import read_header
from asyncload.device import open_device
from asyncload.gguf import GGMLType
from asyncload.options import Options
from asyncload.testing import encode_header, lay_out, synthesize
from bench import _peers, _race, engine
from bench._engine_goals import NATIVE, Goal, goals_of_decoding, goals_of_loads, goals_of_ticker
from bench._race import Contestant, Line, Race, spinning, theirs
from bench._two_headers import Form, TwoHeaders
from bench.load import Row


def load_file(path: str | Path) -> dict[str, Any]:
    load: Callable[[str | Path], dict[str, Any]] = vars(safetensors)["load_file"]  # its types are incomplete
    return load(path)


@pytest.fixture
def file(tmp_path: Path) -> TwoHeaders:
    (path,) = synthesize(tmp_path / "model.gguf", preset="tiny", vocabulary=1024)
    return TwoHeaders(path, read_header(path))


# --- one file, two headers -------------------------------------------------------------------------------------------


def test_both_formats_have_the_same_tensors(file: TwoHeaders) -> None:
    before = file.path.read_bytes()
    for _ in range(2):
        file.become("safetensors")
        tensors = load_file(file.path)
        assert set(tensors) == set(file.header.tensors)
        assert all(tensors[name].tobytes() == file.content(name) for name in tensors)
        file.become("gguf")
        assert file.path.read_bytes() == before
    assert len(file.content("output_norm.weight")) == file.header.tensors["output_norm.weight"].nbytes


def test_gaps_between_tensors_are_tensors_in_safetensors(tmp_path: Path) -> None:
    (path,) = synthesize(tmp_path / "model.gguf", preset="tiny", alignment=4096, vocabulary=1024)
    with path.open("ab") as behind:
        behind.write(b"behind")
    file = TwoHeaders(path, read_header(path))
    file.become("safetensors")
    tensors = load_file(path)
    assert tensors.pop("behind all").tobytes().strip(b"\0") == b"behind"
    gaps = [name for name in tensors if name.startswith("before ")]
    assert gaps
    assert set(tensors) == {*file.header.tensors, *gaps}
    assert all(tensors[name].tobytes() == file.content(name) for name in file.header.tensors)


def test_a_header_without_room_is_refused(tmp_path: Path) -> None:
    specs, nbytes = lay_out([(f"t{number}", GGMLType.F32, (8,)) for number in range(30)])
    path = tmp_path / "model.gguf"
    path.write_bytes(encode_header({"general.architecture": "llama"}, specs) + bytes(nbytes))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="there is room for"):
        TwoHeaders(path, read_header(path))
    assert path.read_bytes() == before


def test_what_was_just_written_is_in_the_page_cache(file: TwoHeaders) -> None:
    file.sync()
    assert file.cached() in {None, 1.0}  # not every file system tells
    assert file.file_system != "unknown"


# --- races -----------------------------------------------------------------------------------------------------------


class Loader:
    """Has numpy read the file's tensors in a way, and notes what it finds."""

    def __init__(self, name: str, form: Form, file: TwoHeaders, note: list[str]) -> None:
        self.name, self.file, self.note = name, file, note
        self.fails: Callable[[int], bool] = lambda _: False
        self.calls = 0
        self.contestant = Contestant(name, form, self.load, lambda loaded, name: loaded[name], self.free, may_fail=True)

    async def load(self) -> dict[str, bytes]:
        self.calls += 1
        form = "gguf" if self.file.path.read_bytes()[:4] == b"GGUF" else "safetensors"
        threads = sum(thread.name == "bench-spin" for thread in threading.enumerate())
        self.note.append(f"{self.name} {form} {threads}")
        if self.fails(self.calls):
            raise OSError("no more")
        return {name: self.file.content(name) for name in self.file.header.tensors}

    async def free(self, loaded: dict[str, bytes]) -> None:
        loaded.clear()
        self.note.append(f"{self.name} free")


def race(
    file: TwoHeaders, entries: Sequence[tuple[Contestant, int]], *, repeats: int = 2, patience: float = 60.0
) -> Race:
    found = Race(file, entries, repeats, patience, limit=lambda: 1e9)
    asyncio.run(found.run())
    return found


def test_loaders_take_turns_with_the_header_that_they_want_and_threads_beside(file: TwoHeaders) -> None:
    note: list[str] = []
    ours, other = Loader("ours", "gguf", file, note), Loader("other", "safetensors", file, note)
    found = race(file, [(ours.contestant, 0), (ours.contestant, 2), (other.contestant, 1)])
    warm = ["ours gguf 0", "ours free", "other safetensors 0", "other free"]
    turns = ["ours gguf 0", "ours free", "ours gguf 2", "ours free", "other safetensors 1", "other free"]
    assert note == warm + turns + turns[2:] + turns[:2]  # another begins each round
    assert found.limits == [1e9, 1e9]
    assert [(line.loader, line.spinning, len(line.runs), len(line.processor)) for line in found.lines] == [
        ("ours", 0, 2, 2),
        ("ours", 2, 2, 0),
        ("other", 1, 2, 0),
    ]
    for line in found.lines:
        assert line.nbytes == file.header.nbytes
        assert line.check is not None
        assert line.check.tensors >= 2
        assert line.check.different == []


def test_a_loader_that_fails_leaves_the_race(file: TwoHeaders) -> None:
    note: list[str] = []
    ours, other = Loader("ours", "gguf", file, note), Loader("other", "safetensors", file, note)
    other.fails = lambda call: call == 2
    found = race(file, [(other.contestant, 0), (other.contestant, 1), (ours.contestant, 0)])
    assert found.failed == {"other": "OSError: no more"}
    assert [line.loader for line in found.lines] == ["ours"]
    assert other.calls == 2
    assert ours.calls == 3


def test_what_may_not_fail_ends_the_race(file: TwoHeaders) -> None:
    async def load() -> None:
        raise OSError("ours")

    async def free(_: Any) -> None: ...

    def content(*_: Any) -> bytes:
        return b""

    with pytest.raises(OSError, match="ours"):
        race(file, [(Contestant("ours", "gguf", load, content, free), 0)])


def test_a_slow_line_is_measured_once_at_least_and_then_left(file: TwoHeaders) -> None:
    loader = Loader("slow", "gguf", file, [])
    found = race(file, [(loader.contestant, 0)], repeats=5, patience=0.0)
    assert len(found.lines[0].runs) == 1


def test_other_bytes_than_the_files_are_found(file: TwoHeaders) -> None:
    first = min(file.header.tensors.values(), key=lambda info: info.offset).name

    def load() -> dict[str, Any]:
        tensors = {name: np.frombuffer(file.content(name), np.uint8).copy() for name in file.header.tensors}
        tensors[first][-1] ^= 1
        return tensors

    check = race(file, [(theirs("other", load), 0)]).lines[0].check
    assert check is not None
    assert check.different == [first]


def test_large_tensors_are_not_compared(file: TwoHeaders, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = sorted(file.header.tensors.values(), key=lambda info: info.nbytes)
    monkeypatch.setattr(_race, "_LARGEST_CHECKED", tensors[-1].nbytes - 1)
    assert tensors[-1].name not in _race.sample(file.header)
    monkeypatch.setattr(_race, "_LARGEST_CHECKED", tensors[-1].nbytes)
    assert {tensors[-1].name, tensors[0].name} <= set(_race.sample(file.header))


def spinners() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "bench-spin"]


@pytest.mark.parametrize("ending", [nullcontext(), pytest.raises(ZeroDivisionError)])
def test_threads_spin_in_the_block_and_no_longer(ending: AbstractContextManager[Any]) -> None:
    with ending, spinning(2):
        assert len(spinners()) == 2
        if not isinstance(ending, nullcontext):
            _ = 1 / 0
    assert spinners() == []


# --- peers -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def instanttensor(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A module in InstantTensor's place, for a machine without a GPU; what it was asked for."""
    asked: list[dict[str, Any]] = []

    class Open:
        def __init__(self, path: str, **how: Any) -> None:
            asked.append(how)
            self._tensors = load_file(path)

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None: ...

        def tensors(self) -> Iterator[tuple[str, Any]]:
            return iter(self._tensors.items())

    module: Any = ModuleType("instanttensor")
    module.safe_open = Open
    module.Backend = {name: name for name in ("AIO_BUFFERED", "URING_BUFFERED", "MMAP")}
    monkeypatch.setitem(sys.modules, "instanttensor", module)
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    monkeypatch.setattr(_peers, "find_spec", str)
    monkeypatch.setattr(_peers, "_synchronize", str)
    monkeypatch.delenv("INSTANTTENSOR_CACHE_BUFFER", raising=False)
    return asked


def test_instanttensor_has_a_loader_for_each_buffered_mode(
    file: TwoHeaders, instanttensor: list[dict[str, Any]]
) -> None:
    loaders = _peers.safetensors_loaders(file.path, "cuda:0", wanted=["instanttensor"])
    assert list(loaders) == [f"InstantTensor, {mode}" for mode in ("AIO_BUFFERED", "URING_BUFFERED", "MMAP")]
    file.become("safetensors")
    for load in loaders.values():
        assert set(load()) == set(file.header.tensors)
    assert [how["backend"] for how in instanttensor] == ["AIO_BUFFERED", "URING_BUFFERED", "MMAP"]
    assert all(how["device"] == "cuda:0" for how in instanttensor)


@pytest.mark.usefixtures("instanttensor")
def test_instanttensor_keeps_its_buffers_where_the_environment_says_so_and_in_its_name(
    file: TwoHeaders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSTANTTENSOR_CACHE_BUFFER", "1")
    loaders = _peers.safetensors_loaders(file.path, "cuda:0", wanted=["instanttensor"])
    assert list(loaders) == [
        f"InstantTensor, {mode}, buffers kept" for mode in ("AIO_BUFFERED", "URING_BUFFERED", "MMAP")
    ]


def test_a_package_that_does_not_import_is_said(
    instanttensor: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> object:
        raise ImportError(f"{name} wants another torch")

    monkeypatch.setattr(_peers, "_module", fail)
    reasons = _peers.missing(["instanttensor"], "cuda:0")
    assert reasons["instanttensor"].startswith("torch does not import: ImportError: ")


# --- goals -----------------------------------------------------------------------------------------------------------


def judged(file: TwoHeaders, *lines: tuple[str, int, float], limit: float = 100.0) -> list[tuple[str, Any, bool]]:
    """What the goals say of lines of GB/s, and of a limit in GB/s: the kind of goal, the value, whether it is met."""
    found = Race(file, [], 1, 1.0, limit=lambda: 0.0, limits=[limit * 1e9])
    found.lines = [Line(name, threads, 1_000_000_000, [1 / rate]) for name, threads, rate in lines]
    return [(goal.goal, pytest.approx(goal.value), goal.met) for goal in goals_of_loads(found, "cuda")]


def test_loads_are_held_against_the_limit_their_idle_rate_and_the_best_other(file: TwoHeaders) -> None:
    others = [("InstantTensor, A", 0, 60.0), ("InstantTensor, B", 0, 80.0), ("InstantTensor, B", 1, 17.0)]
    met = judged(file, (NATIVE, 0, 94.0), (NATIVE, 1, 86.0), (NATIVE, 4, 76.0), *others)
    assert met == [
        ("1.0 GB, idle: at least 0.93 of the limit", 0.94, True),
        ("1.0 GB, one thread spinning: at least 0.9 of its own idle rate", 86 / 94, True),
        ("1.0 GB, 4 threads spinning: at least 0.8 of its own idle rate", 76 / 94, True),
        ("1.0 GB, idle: at least 1.15 times InstantTensor, B's rate", 94 / 80, True),
        ("1.0 GB, one thread spinning: at least 5.0 times InstantTensor, B's rate", 86 / 17, True),
    ]
    others = [("InstantTensor, A", 0, 90.0), ("InstantTensor, A", 1, 20.0)]
    missed = judged(file, (NATIVE, 0, 92.0), (NATIVE, 1, 82.0), (NATIVE, 4, 73.0), *others)
    assert [is_met for _, _, is_met in missed] == [False] * 5


def test_what_was_not_measured_is_not_judged(file: TwoHeaders) -> None:
    assert judged(file, ("asyncload, python", 0, 50.0)) == []
    assert len(judged(file, (NATIVE, 0, 94.0))) == 1


def test_decoding_and_lateness_are_judged() -> None:
    packed = Row("packed", [1.0], 1)
    assert [goal.met for goal in goals_of_decoding(packed, Row("bf16", [1.09], 1))] == [True]
    assert [goal.met for goal in goals_of_decoding(packed, Row("bf16", [1.12], 1))] == [False]

    def rows(late: float) -> dict[str, Any]:
        return {name: {"milliseconds": {"p99.9": value}} for name, value in (("idle", 9.0), ("bf16", late), ("p", 0.1))}

    verdicts = {(nice, late): [goal.met for goal in goals_of_ticker(nice, rows(late))] for nice, late in CASES}
    assert verdicts == {case: [met] for case, met in CASES.items()}
    assert list(goals_of_ticker(5, rows(0.1))) == []
    assert str(Goal("to be fast", 0.5, met=False)) == "NOT met (0.500): to be fast"


CASES = {(0, 3.9): True, (0, 4.1): False, (10, 1.9): True, (10, 2.1): False}


# --- the whole table -------------------------------------------------------------------------------------------------


def test_pread_reads_every_byte_into_memory_that_it_frees(file: TwoHeaders, monkeypatch: pytest.MonkeyPatch) -> None:
    device = open_device("host")
    read: dict[int, bytes] = {}
    free = device.free

    def note(memory: Any) -> None:
        content = bytearray(memory.nbytes)
        device.download(memory, 0, memoryview(content))
        read[memory.address] = bytes(content)
        free(memory)

    monkeypatch.setattr(device, "free", note)
    options = Options(chunk_size=64 << 10).suited_to("host")
    assert engine.pread_limit(device, file, options) > 0
    assert sorted(read.values()) == sorted(file.content(name) for name in file.header.tensors)


@pytest.mark.native
def test_the_table_has_all_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str], begun: list[str]) -> None:
    target = tmp_path / "engine.json"
    arguments = ["--quick", "--device", "host", "--spinning", "1", "--json", str(target)]
    parts = ["--parts", "loads", "spin", "decode", "ticker"]
    assert engine.main([*arguments, *parts, "--peers", "instanttensor", "safetensors"]) == 0
    record = json.loads(target.read_text())
    results = record["results"]
    assert record["options"]["engine"] == "native"
    assert results["not_measured"] == {"instanttensor": "loads to CUDA devices only"}
    loads, spin = results["races"]
    ours = ["asyncload, native", "asyncload, python"]
    kinds = {(row["loader"].partition(".")[0], row["spinning"]) for row in loads["lines"]}
    assert kinds == {(ours[0], 0), (ours[1], 0), (ours[1], 1), ("safetensors", 0), ("safetensors", 1)}
    assert [(row["loader"], row["spinning"]) for row in spin["lines"]] == [(ours[0], 0), (ours[0], 1), (ours[1], 0)]
    for row in loads["lines"] + spin["lines"]:
        rate = row["nbytes"] / row["seconds"]
        assert row["of_limit"] == pytest.approx(rate / loads_or_spin(row, loads, spin)["limits"][0])
        assert row["check"]["different"] == []
        assert (row["processor_seconds_per_gb"] is None) == (row["spinning"] > 0)
    idle, busy = spin["lines"][:2]
    assert busy["of_idle"] == pytest.approx(idle["seconds"] / busy["seconds"])
    assert [row["loader"] for row in results["decoding"]] == ["packed", "bf16"]
    assert results["decoding"][1]["check"]["different"] == []
    assert list(results["ticker"]) == ["0", "10"]
    assert results["goals"] == []
    assert begun.count("python") == 2 + 3  # of the first two parts, warming included
    assert begun[:4] == ["native", "python"] * 2
    assert "instanttensor: NOT MEASURED, loads to CUDA devices only" in capsys.readouterr().out


def loads_or_spin(row: dict[str, Any], loads: dict[str, Any], spin: dict[str, Any]) -> dict[str, Any]:
    return loads if row in loads["lines"] else spin


@pytest.mark.native
def test_the_table_fails_where_contents_differ(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def content(_: TwoHeaders, name: str) -> bytes:
        return name.encode()

    monkeypatch.setattr(TwoHeaders, "content", content)
    assert engine.main(["--quick", "--device", "host", "--parts", "loads"]) == 1
    assert "DIFFERENT from the file" in capsys.readouterr().out
