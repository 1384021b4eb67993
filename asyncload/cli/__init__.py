"""The command ``asyncload``: looks into GGUF files, and loads them.

It is the only room that prints, and the only one that reads the environment (``Options.from_env``).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from asyncload.cli._parser import make_parser
from asyncload.cli._suggestions import explain
from asyncload.cli.text import plain
from asyncload.errors import AsyncloadError, DoesNotFitError

__all__ = ["main"]

_FAILED = 1
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with its arguments (the process's own where None) and returns its exit code.

    0: done. 1: it failed, and one line on stderr says why. 130: Ctrl-C. Arguments that make no sense end in
    ``SystemExit`` with 2, and ``--help`` and ``--version`` with 0, as argparse has it.
    """
    arguments = make_parser().parse_args(argv)
    try:
        arguments.command(arguments)
        sys.stdout.flush()
    except AsyncloadError as error:
        text = explain(error) if isinstance(error, DoesNotFitError) else str(error)
        print(f"asyncload: error: {plain(text)}", file=sys.stderr)
        return _FAILED
    except BrokenPipeError:
        # Whoever read stdout has gone (`asyncload inspect model.gguf | head`). The interpreter flushes once more at
        # its end, and must not fail at that.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    except KeyboardInterrupt:
        print("asyncload: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return 0
