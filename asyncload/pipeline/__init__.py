"""The only tasks: producers read and decode, a bounded queue, consumers feed the device's streams."""

from __future__ import annotations

from asyncload.pipeline._engine import Engine
from asyncload.pipeline._read import read_patiently
from asyncload.pipeline._stats import LoadStats, StageStats
from asyncload.pipeline._transfer import Sink, Transfer

__all__ = ["Engine", "LoadStats", "Sink", "StageStats", "Transfer", "read_patiently"]
