"""What `pip install` makes of a checkout: with the C++ engine where there is a compiler, without it elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from asyncload import __version__

ROOT = Path(__file__).parents[2]
PARTS = ("asyncload", "asyncload_native", "pyproject.toml", "README.md", "LICENSE", ".gitignore")
NO_COMPILER = {"CXX": "/nowhere/c++"}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy without git, and with what a build in place leaves there."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, folder / part)
    (folder / "asyncload_native" / "_native.stale.so").touch()
    return folder


def build(checkout: Path, kind: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Builds a "wheel" or "sdist" as pip does, with what is installed here."""
    return subprocess.run(
        [sys.executable, "-c", f"from scikit_build_core.build import build_{kind} as build; build('dist')"],
        cwd=checkout,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def built(checkout: Path, pattern: str) -> Path:
    (path,) = (checkout / "dist").glob(pattern)
    return path


@pytest.mark.timeout(600)  # it compiles everything
def test_a_wheel_has_the_extension_and_not_its_sources(checkout: Path, tmp_path: Path) -> None:
    result = build(checkout, "wheel", ASYNCLOAD_REQUIRE_NATIVE="1")
    assert result.returncode == 0, result.stdout + result.stderr
    with zipfile.ZipFile(built(checkout, "*.whl")) as wheel:
        names = {name for name in wheel.namelist() if name.startswith("asyncload_native/")}
        wheel.extractall(tmp_path / "site")
    (extension,) = (name for name in names if name.endswith(".so"))
    assert "stale" not in extension
    assert names == {extension, *(f"asyncload_native/{name}" for name in ("__init__.py", "_native.pyi", "py.typed"))}
    shown = subprocess.run(
        [sys.executable, "-c", "import asyncload_native as native; print(native.version, native.__file__)"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.split() == [__version__, str(tmp_path / "site" / "asyncload_native" / "__init__.py")]


def test_without_a_compiler_the_rest_is_installed(checkout: Path) -> None:
    result = build(checkout, "wheel", ASYNCLOAD_REQUIRE_NATIVE="", **NO_COMPILER)
    assert result.returncode == 0, result.stdout + result.stderr
    with zipfile.ZipFile(built(checkout, "*-py3-none-any.whl")) as wheel:
        names = wheel.namelist()
    assert "asyncload/quant/cuda/block.cu" in names
    assert {name.split("/")[0] for name in names} == {"asyncload", f"asyncload-{__version__}.dist-info"}


def test_that_is_an_error_where_the_extension_is_required(checkout: Path) -> None:
    result = build(checkout, "wheel", ASYNCLOAD_REQUIRE_NATIVE="1", **NO_COMPILER)
    assert result.returncode != 0
    assert NO_COMPILER["CXX"] in result.stdout + result.stderr
    assert not list(checkout.glob("dist/*.whl"))


def test_a_source_distribution_can_be_built_from(checkout: Path) -> None:
    result = build(checkout, "sdist")
    assert result.returncode == 0, result.stdout + result.stderr
    with tarfile.open(built(checkout, "*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(checkout)) for path in (checkout / "asyncload_native").rglob("*") if path.is_file()}
    assert sources - names == {name for name in sources if name.endswith(".so")}
    assert {"pyproject.toml", "LICENSE", "README.md", "asyncload/__init__.py"} <= names
