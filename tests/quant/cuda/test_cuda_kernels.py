"""The CUDA kernels without a device: the table, the compiler, and their arithmetic as a host compiler builds it."""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from asyncload.errors import BackendUnavailableError, UnsupportedQuantError
from asyncload.gguf import GGMLType
from asyncload.quant import FAMILIES, DType, native_dtype
from asyncload.quant.cuda import can_decode, compile_kernels, kernel_name, source
from asyncload.quant.cuda._source import assemble
from tests.quant import oracle

Bytes = npt.NDArray[np.uint8]

FLOATS = (DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16)
PAIRS = [(type_, dtype) for type_ in FAMILIES for dtype in FLOATS if can_decode(type_, dtype)]
NEVER_STORED = {GGMLType.Q8_1, GGMLType.Q8_K}
GUARD = 64


# --- the table -------------------------------------------------------------------------------------------------------


def test_every_type_that_files_hold_has_kernels() -> None:
    assert set(FAMILIES) == {type_ for type_ in GGMLType if not type_.integer} - NEVER_STORED


def test_every_pair_that_is_no_copy_has_a_kernel() -> None:
    assert set(PAIRS) == {(type_, dtype) for type_ in FAMILIES for dtype in FLOATS if native_dtype(type_) != dtype}
    text = source(PAIRS)
    assert all(f"struct {type_.name} " in text for type_ in FAMILIES)
    assert all(f"KERNEL({type_.name}, {dtype})\n" in text for type_, dtype in PAIRS)


@pytest.mark.parametrize("type_name", sorted(type_.name for type_ in NEVER_STORED | {GGMLType.I8, GGMLType.F32}))
def test_other_pairs_are_refused(type_name: str) -> None:
    pair = GGMLType[type_name], DType.FLOAT32
    for refuse in (lambda: kernel_name(*pair), lambda: source([pair]), lambda: compile_kernels("sm_90", [pair])):
        with pytest.raises(UnsupportedQuantError) as caught:
            refuse()
        assert (caught.value.type, caught.value.dtype) == (type_name, "float32")


def test_the_program_is_the_same_for_the_same_set_of_pairs() -> None:
    q4, q6 = (GGMLType.Q4_K, DType.BFLOAT16), (GGMLType.Q6_K, DType.BFLOAT16)
    assert source([q4, q6]) == source([q6, q4, q6]) != source([q4])


def test_importing_it_loads_neither_numpy_nor_cuda() -> None:
    code = "import sys, asyncload.quant.cuda as it; it.source([(it.GGMLType.Q4_K, 'bfloat16')]); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"numpy", "numba", "gguf", "cuda", "torch"}.isdisjoint(result.stdout.split())


# --- the compiler ----------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for the user's caches."""
    pytest.importorskip("cuda.core", reason="the compiler comes with cuda.core")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def files_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_every_kernel_compiles_without_a_device(arch: str, cache: Path) -> None:
    cubin: bytes = compile_kernels(arch, PAIRS).code
    assert cubin.startswith(b"\x7fELF")
    assert all(f".text.{kernel_name(*pair)}\0".encode() in cubin for pair in PAIRS)


def test_the_compiled_program_is_kept_on_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [(GGMLType.Q4_0, DType.FLOAT16)]
    first = compile_kernels("sm_90", pairs).code
    kept = files_in(cache)
    assert [path.read_bytes() for path in kept] == [first]
    (path,) = kept
    path.write_bytes(first + b"mark")
    assert compile_kernels("sm_90", pairs).code == first + b"mark"
    compile_kernels("sm_80", pairs)
    monkeypatch.setattr("asyncload.quant.cuda._program.assemble", _another_source)
    assert compile_kernels("sm_90", pairs).code != first + b"mark"
    assert len(files_in(cache)) == 3


def _another_source(pairs: Collection[tuple[GGMLType, DType]]) -> str:
    return source(pairs) + "\n// another\n"


def test_it_compiles_where_nothing_can_be_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (cache / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "file"))
    with caplog.at_level(logging.WARNING, "asyncload.quant"):
        assert compile_kernels("sm_90", [(GGMLType.Q4_0, DType.FLOAT16)]).code
    assert "cannot be kept" in caplog.text


def test_the_compilers_library_is_there_before_anybody_loads_it_with_the_lock(cache: Path) -> None:
    code = (
        "import sys; from asyncload.quant.cuda._program import load_nvrtc; load_nvrtc();"
        "print('libnvrtc.so' in open('/proc/self/maps').read(), 'cuda' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", "False"]


def test_an_architecture_that_the_compiler_does_not_know_is_an_error_of_ours(cache: Path) -> None:
    with pytest.raises(BackendUnavailableError, match="sm_11"):
        compile_kernels("sm_11", [(GGMLType.Q4_0, DType.FLOAT16)])


# --- the arithmetic --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels as functions of the host: the same text upon another ``device.cu``, with one thread."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("kernels")
    text = folder / "kernels.cpp"
    text.write_text(assemble(PAIRS, device=Path(__file__).with_name("host_device.h").read_text()))
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared"]
    built = folder / "kernels.so"
    subprocess.run([compiler, *flags, "-o", built, text], check=True, capture_output=True, timeout=100)
    return ctypes.CDLL(str(built))


def decoded(
    library: ctypes.CDLL, type_: GGMLType, dtype: DType, blocks: Bytes, *, shift: int = 0, target_shift: int = 0
) -> Bytes:
    """Runs a kernel on blocks that start ``shift`` bytes after an aligned address.

    Nothing else may be written, and of what lies around the blocks only the rest of their first and last words is read.
    """
    kernel: Any = getattr(library, kernel_name(type_, dtype))
    kernel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64]
    nbytes = len(blocks) * type_.block_size * dtype.itemsize
    room, target = np.empty(blocks.size + shift + 2 * GUARD, np.uint8), np.full(nbytes + 3 * GUARD, 0xA5, np.uint8)
    begin = -room.ctypes.data % GUARD + shift
    room[begin : begin + blocks.size] = blocks.reshape(-1)
    at = -target.ctypes.data % GUARD + target_shift
    first, last = room.ctypes.data + begin, room.ctypes.data + begin + blocks.size
    for name, value in (("begin", first // 4 * 4), ("end", -(-last // 4) * 4)):
        ctypes.c_uint64.in_dll(library, f"readable_{name}").value = value
    elsewhere = ctypes.c_uint64.in_dll(library, "read_elsewhere")
    elsewhere.value = 0
    kernel(room.ctypes.data + begin, target.ctypes.data + at, len(blocks))
    assert elsewhere.value == 0
    assert (target[:at] == 0xA5).all()
    assert (target[at + nbytes :] == 0xA5).all()
    return target[at : at + nbytes].copy()


@pytest.mark.parametrize("shift", [0, 16, 1, 2, 4])
def test_every_bit_is_the_references(type_: GGMLType, dtype: DType, shift: int, library: ctypes.CDLL) -> None:
    assert oracle.mistakes(type_, dtype, decoded(library, type_, dtype, oracle.blocks(type_), shift=shift)) == 0


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 31, 33])
def test_any_number_of_blocks(type_: GGMLType, dtype: DType, count: int, library: ctypes.CDLL) -> None:
    some = oracle.blocks(type_)[:count]
    for first in range(4):  # plain weights may go to any multiple of their size
        target_shift = 0 if type_.quantized else first * dtype.itemsize
        got = decoded(library, type_, dtype, some, shift=first * type_.type_size, target_shift=target_shift)
        assert oracle.mistakes(type_, dtype, got) == 0
