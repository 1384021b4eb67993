"""What llama.cpp said of the demo's model: made by ``make_reference.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["REFERENCE"]

REFERENCE: Any = json.loads(Path(__file__).with_name("reference.json").read_text())
