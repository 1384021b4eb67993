"""What importing costs: a fresh interpreter each time, less what one takes that imports nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench._common import make_parser, median_seconds, print_table, write_record

_IMPORTS = {
    "import asyncload": "import asyncload",
    "every public name": "import asyncload\nfor name in asyncload.__all__: getattr(asyncload, name)",
    "the command": "import asyncload.cli",
    "numpy, for scale": "import numpy",
}


def _interpreter(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def main(argv: Sequence[str] | None = None) -> int:
    arguments = make_parser(__doc__ or "", device=False, loads=False).parse_args(argv)
    repeats = 1 if arguments.quick else 15
    bare = median_seconds(partial(_interpreter, "pass"), repeats)
    results = {what: median_seconds(partial(_interpreter, code), repeats) - bare for what, code in _IMPORTS.items()}
    print_table(
        f"importing, over the {bare * 1e3:.1f} ms of a bare interpreter",
        [("what", "milliseconds"), *((what, f"{seconds * 1e3:.1f}") for what, seconds in results.items())],
    )
    write_record(arguments.json, "start", {"bare": bare, "seconds": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
