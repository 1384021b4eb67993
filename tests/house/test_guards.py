"""The guards in conftest.py are able to bite: a pytest of its own runs tests that they must stop."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Code that claims to lie in asyncload and blocks its caller's thread.
BLOCKING = f"""
import time
import pytest

code = compile("def block():\\n    time.sleep(0)", {str(ROOT / "asyncload" / "imaginary.py")!r}, "exec")
names = {{"time": time}}
exec(code, names)
"""


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    pytester.makepyprojecttoml((ROOT / "pyproject.toml").read_text())
    return pytester


def run(inner: pytest.Pytester, source: str) -> pytest.RunResult:
    path = inner.makepyfile(source)
    return inner.runpytest_subprocess("-rP", "-p", "no:cacheprovider", path)


def test_anyio_tests_run_on_every_backend(inner: pytest.Pytester) -> None:
    result = run(
        inner,
        """
        import pytest
        import sniffio

        @pytest.mark.anyio
        async def test_backend():
            loop = "trio"
            if sniffio.current_async_library() == "asyncio":
                import asyncio
                loop = type(asyncio.get_running_loop()).__module__.partition(".")[0]
            print(f"[ran on {loop}]")
        """,
    )
    result.assert_outcomes(passed=3)
    for loop in ("asyncio", "uvloop", "trio"):
        assert f"[ran on {loop}]" in result.stdout.str()


@pytest.mark.parametrize("mark", ["anyio", "asyncio"])
def test_blocking_calls_below_asyncload_fail(inner: pytest.Pytester, mark: str) -> None:
    source = f"{BLOCKING}\n@pytest.mark.{mark}\nasync def test_it():\n    names['block']()\n"
    result = run(inner, source)
    assert "Blocking call to time.sleep" in result.stdout.str()
    # blockbuster watches asyncio's loops only
    result.assert_outcomes(**({"passed": 1, "failed": 2} if mark == "anyio" else {"failed": 1}))


def test_blocking_calls_without_a_loop_pass(inner: pytest.Pytester) -> None:
    run(inner, f"{BLOCKING}\ndef test_it():\n    names['block']()\n").assert_outcomes(passed=1)


NEEDS = """
import pytest

@pytest.mark.{need}
def test_one():
    raise AssertionError("ran")

@pytest.mark.{need}
def test_two():
    raise AssertionError("ran")
"""


@pytest.fixture(params=["gpu", "native", "uring"])
def missing(request: pytest.FixtureRequest, inner: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> str:
    """Something that tests need and that is not there, and not required."""
    need: str = request.param
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    inner.makepyfile(asyncload_native="raise ImportError('was not built')")
    monkeypatch.delenv(f"ASYNCLOAD_REQUIRE_{need.upper()}", raising=False)
    return need


def test_what_is_missing_is_said_loudly(inner: pytest.Pytester, missing: str) -> None:
    result = run(inner, NEEDS.format(need=missing))
    result.assert_outcomes(skipped=2)
    result.stdout.fnmatch_lines([f"*{missing.upper()}: 2 tests did NOT run*", f"{missing.upper()}: *"])


def test_what_is_missing_fails_where_it_is_required(
    inner: pytest.Pytester, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = f"ASYNCLOAD_REQUIRE_{missing.upper()}"
    monkeypatch.setenv(variable, "1")
    result = run(inner, NEEDS.format(need=missing))
    assert result.parseoutcomes().get("failed", 0) + result.parseoutcomes().get("errors", 0) == 2
    assert f"{variable}=1, but: " in result.stdout.str()


def test_warnings_are_errors(inner: pytest.Pytester) -> None:
    run(inner, "import warnings\ndef test_it():\n    warnings.warn('careful')\n").assert_outcomes(failed=1)
