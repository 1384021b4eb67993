"""``python -m tests.native.sanitize thread|address BUILD [pytest's arguments]``: tests with a sanitizer's runtime.

BUILD has the extension and the stand-in driver, built with that sanitizer, and the package below ``install``. What the
sanitizer reports is read from its files, as pytest catches what is printed. First it must find what is wrong with three
functions of the stand-in. Races and leaks count where our code is on a stack: the interpreter and others leave much
behind, and are not instrumented.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

RUNTIMES = {"thread": ["libtsan.so"], "address": ["libasan.so", "libstdc++.so"]}  # the latter, for exceptions
FAULTS = {
    "thread": {"stub_race()": "data race"},
    "address": {"stub_overflow(64)": "heap-buffer-overflow", "stub_leak(64)": "Direct leak of 64 byte"},
}
SUPPRESSIONS = Path(__file__).with_name("thread.supp")
# What is found in passing; whatever else AddressSanitizer reports has ended the process.
PASSING = re.compile(
    r"^WARNING: ThreadSanitizer.*?^SUMMARY[^\n]*\n|^(?:Direct|Indirect) leak of .*?\n\n", re.MULTILINE | re.DOTALL
)
OURS = re.compile(r"/asyncload_native/src/|/(?:stub_cuda|one_core)\.cpp:|\basyncload::")
WIDTH = 200  # of a report's lines: templates have long names


class Sanitizer:
    """Runs Python with a sanitizer's runtime, and reads what it reports."""

    def __init__(self, name: str, build: Path) -> None:
        self.name = name
        self.build = build.resolve()
        self._reports = self.build / "reports"
        options = f"log_path={self._reports / 'report'}:exitcode=0"
        self._environment = {
            **os.environ,
            "LD_PRELOAD": " ".join(map(_runtime, RUNTIMES[name])),
            "TSAN_OPTIONS": f"{options}:suppressions={SUPPRESSIONS}",
            "ASAN_OPTIONS": f"{options}:detect_leaks=1",
            "LSAN_OPTIONS": "exitcode=0",
            "PYTHONMALLOC": "malloc",  # where the sanitizers see it
            "ASYNCLOAD_NATIVE_BUILD": str(self.build),
        }

    def run(self, *arguments: str) -> tuple[int, list[str]]:
        """Runs ``python`` with arguments; returns its exit code and what was reported."""
        self._reports.mkdir(exist_ok=True)
        for report in self._reports.iterdir():
            report.unlink()
        code = subprocess.run([sys.executable, *arguments], env=self._environment, check=False).returncode
        return code, [found for path in sorted(self._reports.iterdir()) if (found := _that_count(path.read_text()))]

    def check(self) -> None:
        """Has it find what is wrong."""
        for call, wrong in FAULTS[self.name].items():
            library = self.build / "libstub_cuda.so"
            _, reports = self.run("-c", f"import ctypes; ctypes.CDLL({str(library)!r}).{call}")
            if not any(wrong in report for report in reports):
                raise SystemExit(f"the {self.name} sanitizer does not find what is wrong with {call}: {reports}")


def _runtime(library: str) -> str:
    result = subprocess.run(["c++", f"-print-file-name={library}"], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def _that_count(report: str) -> str:
    """A report without what is found in passing in code that is not ours."""
    if "ERROR: AddressSanitizer" in report:
        return report
    return "".join(found for found in PASSING.findall(report) if OURS.search(found))


def main(name: str, build: str, *arguments: str) -> int:
    """Checks the sanitizer, then runs pytest, with a build."""
    sanitizer = Sanitizer(name, Path(build))
    sanitizer.check()
    paths = f"pythonpath={sanitizer.build / 'install'} ."
    code, reports = sanitizer.run("-m", "pytest", "-o", paths, *arguments)
    for line in "\n".join(reports).splitlines():
        sys.stdout.write(f"{line[:WIDTH]}\n")
    return code or int(bool(reports))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
