"""What Python sees of the extension."""

from __future__ import annotations

from pathlib import Path

import pytest

import asyncload

pytestmark = pytest.mark.native

STUB = Path(__file__).parents[2] / "asyncload_native" / "_native.pyi"


def test_it_is_built_from_this_version() -> None:
    import asyncload_native

    assert asyncload_native.version == asyncload.__version__
    assert asyncload_native.compiler.split()[0] in {"gcc", "clang"}


def test_the_package_shows_all_of_the_module() -> None:
    import asyncload_native
    from asyncload_native import _native

    assert asyncload_native.__all__ == sorted(name for name in vars(_native) if not name.startswith("_"))


def test_the_stub_is_the_modules(tmp_path: Path) -> None:
    from nanobind.stubgen import main  # needed to build the extension, so it is there

    written = tmp_path / "_native.pyi"
    main(["-q", "-m", "asyncload_native._native", "--exclude-values", "-o", str(written)])
    assert STUB.read_text() == written.read_text(), "`make stubs` writes it"
