"""Memory with a budget and a ledger: staging buffers on the host, allocations on the device."""

from __future__ import annotations

from asyncload.memory._scratch import Scratch
from asyncload.memory._staging import StagingBuffer, StagingPool, StagingShare
from asyncload.memory._tracker import Allocation, Purpose, VramTracker

__all__ = ["Allocation", "Purpose", "Scratch", "StagingBuffer", "StagingPool", "StagingShare", "VramTracker"]
