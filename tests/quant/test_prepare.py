"""The cache of compiled kernels, always in processes of its own: what one process compiled, no other compiles again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import asyncload
from asyncload.errors import UnsupportedQuantError
from asyncload.gguf import GGMLType
from asyncload.quant import DType, prepare
from asyncload.quant._kernels import DECODERS
from tests.quant import oracle

# Prepares pairs, decodes one block, and tells what happened in this process.
SCRIPT = """
import json, logging, subprocess, sys
logging.basicConfig(format="%(name)s %(levelname)s %(message)s")
import numba.core.event as event
from asyncload.gguf import GGMLType
from asyncload.quant import DType, decode, prepare
passes, children, run = [], [], subprocess.run
def count(*arguments, **options):
    children.append(arguments)
    return run(*arguments, **options)
subprocess.run = count
class Listener(event.Listener):
    def on_start(self, event):
        if "_decode_blocks" in event.data["qualname"]: passes.append(event.data["name"])
    def on_end(self, event): pass
event.register("numba:run_pass", Listener())
{before}
prepare([(GGMLType.Q4_0, DType.FLOAT32), (GGMLType.Q8_0, DType.BFLOAT16)])
{after}
target = bytearray(128)
decode(GGMLType.Q4_0, DType.FLOAT32, memoryview(b"\\0\\x3c" + b"\\x80" * 16), memoryview(target))
from asyncload.quant._kernels import KERNEL
hits = sum(KERNEL.stats.cache_hits.values())
folder = KERNEL.stats.cache_path
values = memoryview(target).cast("f").tolist()
print(json.dumps(dict(passes=len(passes), children=len(children), hits=hits, folder=folder, values=values)))
"""
PACKAGE = Path(asyncload.__file__).parent
# Of a scale of 1 and codes of 0 and 8.
VALUES = [-8.0] * 16 + [0.0] * 16


@dataclass
class Outcome:
    passes: int  # compiler passes over the kernel in the process itself
    children: int  # subprocesses that it started
    hits: int  # loads from the cache on disk
    folder: str | None  # of the cache
    values: list[float]
    log: str


def run(environment: Mapping[str, str], before: str = "", after: str = "") -> Outcome:
    script = SCRIPT.replace("{before}", before).replace("{after}", after)
    result = subprocess.run(
        [sys.executable, "-P", "-c", script],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    return Outcome(**json.loads(result.stdout), log=result.stderr)


@pytest.fixture
def cache(tmp_path: Path) -> dict[str, str]:
    return {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """The first process with an empty cache, and the cache that it leaves."""
    folder = tmp_path_factory.mktemp("cold")
    return run({"NUMBA_CACHE_DIR": str(folder)}), folder


@pytest.fixture
def warm_cache(cold: tuple[Outcome, Path], cache: dict[str, str]) -> dict[str, str]:
    """A copy of that cache."""
    shutil.copytree(cold[1], cache["NUMBA_CACHE_DIR"])
    return cache


@pytest.fixture
def copied_package(tmp_path: Path) -> Path:
    """A copy of what decodes, to be changed."""
    package = tmp_path / "copy" / "asyncload"
    for room in ("gguf", "quant"):
        shutil.copytree(PACKAGE / room, package / room, ignore=shutil.ignore_patterns("__pycache__"))
    for module in ("__init__.py", "errors.py"):
        shutil.copy(PACKAGE / module, package)
    return package


def files(environment: Mapping[str, str]) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in Path(environment["NUMBA_CACHE_DIR"]).rglob("*.*")}


def code_files(environment: Mapping[str, str]) -> list[Path]:
    return sorted(Path(environment["NUMBA_CACHE_DIR"]).rglob("*.nbc"))


def test_a_cold_cache_is_filled_by_a_subprocess(cold: tuple[Outcome, Path]) -> None:
    outcome, folder = cold
    assert (outcome.passes, outcome.children, outcome.hits, outcome.values) == (0, 1, 2, VALUES)
    assert len(code_files({"NUMBA_CACHE_DIR": str(folder)})) == 2


def test_a_warm_cache_is_only_read(warm_cache: dict[str, str]) -> None:
    filled = files(warm_cache)
    warm = run(warm_cache)
    assert (warm.passes, warm.children, warm.hits, warm.values) == (0, 0, 2, VALUES)
    assert files(warm_cache) == filled


def test_c_functions_are_found_in_the_cache_with_the_kernels(warm_cache: dict[str, str]) -> None:
    """Also that of a plain copy, which is compiled once somebody asks for its address."""
    addresses = """
import ctypes
from asyncload.quant import kernel_address
def by_address(type_, dtype, source, nbytes):
    function = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    target = ctypes.create_string_buffer(nbytes)
    assert function(kernel_address(type_, dtype))(source, target, len(source) // type_.type_size) == 1
    return target
values = memoryview(by_address(GGMLType.Q4_0, DType.FLOAT32, b"\\0\\x3c" + b"\\x80" * 16, 128)).cast("B").cast("f")
assert values.tolist() == [-8.0] * 16 + [0.0] * 16
"""
    known = run(warm_cache, after=addresses)
    assert (known.passes, known.children, known.hits) == (0, 0, 2)
    addresses += "assert by_address(GGMLType.I16, DType.INT16, bytes(range(246)), 246).raw == bytes(range(246))"
    for children in (1, 0):
        outcome = run(warm_cache, after=addresses)
        assert (outcome.passes, outcome.children, outcome.hits) == (0, children, 3)


def test_what_is_ready_is_not_prepared_again(warm_cache: dict[str, str]) -> None:
    again = "prepare([(GGMLType.Q4_0, DType.FLOAT32)] * 2)\nprepare([])\nprepare([(GGMLType.F16, DType.FLOAT16)])"
    outcome = run(warm_cache, after=again)
    assert (outcome.children, outcome.hits) == (0, 2)


def test_many_threads_prepare_once(cache: dict[str, str]) -> None:
    outcome = run(
        cache,
        before="""
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(8) as pool:
    list(pool.map(prepare, [[(GGMLType.Q4_0, DType.FLOAT32), (GGMLType.Q8_0, DType.BFLOAT16)]] * 8))
""",
    )
    assert (outcome.passes, outcome.children, outcome.hits, outcome.values) == (0, 1, 2, VALUES)


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("sys.executable = '/bin/false'", "could not be compiled in a subprocess"),
        ("sys.executable = '/no/such/python'", "could not be compiled in a subprocess"),
        ("sys.frozen = True", "in this process"),
    ],
    ids=["failing", "missing", "frozen"],
)
def test_without_a_subprocess_it_compiles_here_and_says_so(cache: dict[str, str], before: str, said: str) -> None:
    outcome = run(cache, before)
    assert outcome.passes > 0
    assert outcome.values == VALUES
    assert "asyncload.quant WARNING" in outcome.log
    assert said in outcome.log
    assert len(code_files(cache)) == 2  # kept for the next process all the same


def test_an_interrupt_from_the_terminal_does_not_reach_the_subprocess(cache: dict[str, str]) -> None:
    """It goes to the whole group of processes; who waits here would then compile all of it in this one."""
    outcome = run(
        cache,
        before="""
import os, signal
os.setsid()
signal.signal(signal.SIGINT, lambda *_: None)
class Popen(subprocess.Popen):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        os.killpg(0, signal.SIGINT)
subprocess.Popen = Popen
""",
    )
    assert (outcome.passes, outcome.children, outcome.values) == (0, 1, VALUES)


def test_without_a_place_to_write_it_compiles_here(copied_package: Path, tmp_path: Path) -> None:
    """Permissions would not stop the superuser; a file where the folder should be does."""
    (copied_package / "quant" / "__pycache__").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"")
    nowhere = str(tmp_path / "file" / "below")
    environment = {
        "PYTHONPATH": str(copied_package.parent),
        "NUMBA_CACHE_DIR": nowhere,
        "XDG_CACHE_HOME": nowhere,
        "HOME": nowhere,
    }
    outcome = run(environment)
    assert outcome.passes > 0
    assert (outcome.children, outcome.folder, outcome.values) == (0, None, VALUES)
    assert "in this process" in outcome.log


def test_a_disk_that_fills_up_is_survived(cache: dict[str, str]) -> None:
    outcome = run(
        cache,
        before="""
sys.frozen = True
import numba.core.caching
def full(*_): raise OSError(28, "No space left on device")
numba.core.caching.IndexDataCacheFile._save_data = full
""",
    )
    assert outcome.values == VALUES
    assert "No space left" in outcome.log


def test_nobody_else_writes_the_cache_meanwhile(cache: dict[str, str]) -> None:
    outcome = run(
        cache,
        before="""
sys.frozen = True
import fcntl, numba.core.caching
from pathlib import Path
def save(self, key, data, save=numba.core.caching.IndexDataCacheFile.save):
    with (Path(self._cache_path) / "asyncload.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            save(self, key, data)
numba.core.caching.IndexDataCacheFile.save = save
""",
    )
    assert outcome.values == VALUES
    assert len(code_files(cache)) == 2


def test_changed_sources_are_compiled_anew(copied_package: Path, cache: dict[str, str]) -> None:
    """Numba itself watches the kernel's file only; the decoders are in others."""
    environment = {**cache, "PYTHONPATH": str(copied_package.parent)}
    assert run(environment).values == VALUES
    decoders = copied_package / "quant" / "_legacy.py"
    original = decoders.read_text()
    decoders.write_text(original.replace("(q - 8).to_float()", "(q - 7).to_float()"))
    changed = run(environment)
    assert changed.children == 1
    assert changed.values == [value + 1 for value in VALUES]
    decoders.write_text(original)
    restored = run(environment)
    assert (restored.children, restored.values) == (0, VALUES)


def test_other_sizes_of_blocks_are_compiled_in_anew(copied_package: Path, cache: dict[str, str]) -> None:
    """They come from another room, and are constants of the machine code."""
    environment = {**cache, "PYTHONPATH": str(copied_package.parent)}
    assert run(environment).children == 1
    types = copied_package / "gguf" / "_types.py"
    original = types.read_text()
    types.write_text(original.replace("Q8_0 = 8, 32, 34", "Q8_0 = 8, 32, 36"))
    assert types.read_text() != original
    assert run(environment).children == 1


def test_other_tables_are_compiled_in_anew(tmp_path: Path, cache: dict[str, str]) -> None:
    """The tables come from the gguf package when a kernel is compiled, and never when it is loaded."""
    found = find_spec("gguf")
    assert found is not None
    assert found.origin is not None
    package = tmp_path / "gguf"
    shutil.copytree(Path(found.origin).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**cache, "PYTHONPATH": os.pathsep.join([str(package.parent), str(PACKAGE.parent)])}
    first_value = """
target = bytearray(128)
prepare([(GGMLType.IQ4_NL, DType.FLOAT32)])
decode(GGMLType.IQ4_NL, DType.FLOAT32, memoryview(b"\\0\\x3c" + bytes(16)), memoryview(target))
assert "gguf" not in sys.modules
print("value", memoryview(target).cast("f")[0], file=sys.stderr)
"""
    tables = package / "quants.py"
    original = tables.read_text()
    for text, children, value in (
        (original, 2, "value -127.0"),
        (original.replace("(-127, -104,", "(-126, -104,"), 2, "value -126.0"),
        (original, 0, "value -127.0"),
    ):
        tables.write_text(text)
        outcome = run(environment, after=first_value)
        assert (outcome.passes, outcome.children) == (0, children)
        assert value in outcome.log


@pytest.mark.parametrize("damage", ["truncated", "swapped", "missing", "index"])
def test_a_damaged_cache_is_written_again(warm_cache: dict[str, str], damage: str) -> None:
    first, second = code_files(warm_cache)
    match damage:
        case "truncated":
            first.write_bytes(first.read_bytes()[:1000])
            second.write_bytes(b"")
        case "swapped":  # a writer that died between the index and the code leaves such a state
            code = first.read_bytes()
            first.write_bytes(second.read_bytes())
            second.write_bytes(code)
        case "missing":
            first.unlink()
            second.unlink()
        case _:
            (index,) = first.parent.glob("*.nbi")
            index.write_bytes(index.read_bytes()[:-20])
    repaired = run(warm_cache)
    assert (repaired.passes, repaired.children, repaired.values) == (0, 1, VALUES)
    if damage == "swapped":  # the second was good, but filed as the first; the next process compiles it once more
        run(warm_cache)
    warm = run(warm_cache)
    assert (warm.children, warm.hits, warm.values) == (0, 2, VALUES)


LEVELS = {
    "x86-64": [
        GGMLType.Q4_0,
        GGMLType.Q5_1,
        GGMLType.Q2_K,
        GGMLType.Q3_K,
        GGMLType.TQ1_0,
        GGMLType.IQ4_NL,
        GGMLType.IQ2_XS,
    ],  # nothing is looked up
    "x86-64-v2": list(DECODERS),  # no F16C: float16 is converted by integers
    "x86-64-v3": list(DECODERS),  # no AVX-512: only bytes are looked up
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="these are levels of x86-64")
def test_lesser_processors_give_the_same_bits(level: str, cache: dict[str, str], tmp_path: Path) -> None:
    types = LEVELS[level]
    for type_ in types:
        oracle.blocks(type_).tofile(tmp_path / type_.name)
    script = """
import sys
from itertools import product
from pathlib import Path
from asyncload.gguf import GGMLType
from asyncload.quant import DType, decode
from asyncload.quant._kernels import processor
from asyncload.quant._warm import main
assert (processor().half, processor().permute) == (sys.argv[2] == "x86-64-v3", False), processor()
pairs = list(product([GGMLType[name] for name in sys.argv[3:]], (DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16)))
main([f"{type_.name}:{dtype}" for type_, dtype in pairs])
for type_, dtype in pairs:
    source = (Path(sys.argv[1]) / type_.name).read_bytes()
    target = bytearray(len(source) // type_.type_size * type_.block_size * dtype.itemsize)
    decode(type_, dtype, memoryview(source), memoryview(target))
    (Path(sys.argv[1]) / f"{type_.name}-{dtype}").write_bytes(target)
"""
    target = {"PYTHONPATH": str(PACKAGE.parent), "NUMBA_CPU_NAME": level, "NUMBA_CPU_FEATURES": ""}
    command = [sys.executable, "-P", "-c", script, str(tmp_path), level, *(type_.name for type_ in types)]
    subprocess.run(command, env={**os.environ, **cache, **target}, check=True, timeout=100)
    for type_ in types:
        for dtype in (DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16):
            got = np.fromfile(tmp_path / f"{type_.name}-{dtype}", np.uint8)
            assert oracle.mistakes(type_, dtype, got) == 0, (type_, dtype)


def test_pairs_outside_the_table_are_refused_before_anything_is_compiled() -> None:
    with pytest.raises(UnsupportedQuantError) as caught:
        prepare([(GGMLType.Q4_0, DType.FLOAT32), (GGMLType.Q8_1, DType.FLOAT32)])
    assert (caught.value.type, caught.value.dtype) == ("Q8_1", "float32")
