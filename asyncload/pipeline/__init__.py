"""The only tasks: what moves bytes from sources to a device, in Python or in C++ threads."""

from __future__ import annotations

from asyncload.pipeline._backend import Backend, Hears, Sink, Transfer
from asyncload.pipeline._engine import Engine
from asyncload.pipeline._native import NativeBackend, NativeDevice
from asyncload.pipeline._read import read_patiently
from asyncload.pipeline._spans import ThreadSpan, ThreadSpans
from asyncload.pipeline._stats import LoadStats, StageStats

__all__ = [
    "Backend",
    "Engine",
    "Hears",
    "LoadStats",
    "NativeBackend",
    "NativeDevice",
    "Sink",
    "StageStats",
    "ThreadSpan",
    "ThreadSpans",
    "Transfer",
    "read_patiently",
]
