"""`import asyncload` is light, and so is everything in its front window."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import asyncload

HEAVY = {"numpy", "numba", "llvmlite", "gguf", "cuda", "torch", "cupy", "ml_dtypes"}


def loaded_by(code: str) -> set[str]:
    """The names of all modules that a fresh interpreter has loaded once it has run the code."""
    script = f"import sys\n{code}\nimport json\nprint(json.dumps(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(asyncload.__file__).parents[1],
    )
    return set(json.loads(result.stdout))


def roots(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


def test_import_loads_nothing_but_itself() -> None:
    new = loaded_by("import asyncload") - loaded_by("import __future__, importlib, typing")
    assert new == {"asyncload"}


def test_public_names_load_nothing_heavy() -> None:
    modules = loaded_by("import asyncload\nfor name in asyncload.__all__: getattr(asyncload, name)")
    assert "asyncload.loader" in modules
    assert roots(modules) & HEAVY == set()


def test_the_probe_sees_heavy_packages() -> None:
    assert {"numpy", "gguf"} <= roots(loaded_by("import gguf"))


def test_all_names_resolve_and_are_listed() -> None:
    assert dir(asyncload) == sorted(asyncload.__all__)
    for name in asyncload.__all__:
        assert getattr(asyncload, name) is getattr(asyncload, name)


def test_unknown_names_are_attribute_errors() -> None:
    assert not hasattr(asyncload, "stream_of_consciousness")
