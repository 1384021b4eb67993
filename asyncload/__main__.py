"""``python -m asyncload`` is the command ``asyncload``."""

from __future__ import annotations

import sys

from asyncload.cli import main

if __name__ == "__main__":
    sys.exit(main())
