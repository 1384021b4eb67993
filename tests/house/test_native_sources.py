"""The C++ sources keep to their rooms: one file knows Python, one the driver's library, and each is compiled."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "asyncload_native"
SOURCES = sorted((NATIVE / "src").iterdir())
INCLUDE = re.compile(r'^#include [<"](.+?)[>"]', re.MULTILINE)


def including(pattern: str) -> set[str]:
    """The names of the sources that include a header whose name the pattern matches."""
    return {
        source.name
        for source in SOURCES
        if any(re.match(pattern, header) for header in INCLUDE.findall(source.read_text()))
    }


def test_only_the_module_knows_python() -> None:
    assert including(r"nanobind/|Python\.h|pybind|numpy/") == {"module.cpp"}


def test_nobody_needs_the_headers_of_cuda() -> None:
    assert including(r"(cuda|cudart\w*|cuda_runtime\w*|nvrtc|nvml)\.h") == set()


def test_only_the_table_opens_libraries() -> None:
    assert including(r"dlfcn\.h") == {"driver.cpp"}


def test_each_source_is_compiled_once() -> None:
    listed = re.findall(r"\bsrc/(\w+\.cpp)", (NATIVE / "CMakeLists.txt").read_text())
    assert sorted(listed) == [source.name for source in SOURCES if source.suffix == ".cpp"]


def test_only_adapters_name_it() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = (each for each in contracts if each.get("protected_modules") == ["asyncload_native"])
    naming = re.compile(r"""^\s*(?:import|from) asyncload_native\b|["']asyncload_native["']""", re.MULTILINE)
    assert sorted(contract["allowed_importers"]) == [  # import-linter does not see `import_module`
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "asyncload").rglob("*.py"))
        if naming.search(path.read_text())
    ]
