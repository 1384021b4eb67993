"""Memory with a budget and a ledger: staging buffers on the host, allocations on the device."""

from __future__ import annotations

from asyncload.memory._allocation import Allocation, Registration
from asyncload.memory._ledger import Purpose
from asyncload.memory._reconcile import Reconciliation
from asyncload.memory._scratch import Scratch
from asyncload.memory._staging import StagingBuffer, StagingPool, StagingShare
from asyncload.memory._tracker import VramTracker

__all__ = [
    "Allocation",
    "Purpose",
    "Reconciliation",
    "Registration",
    "Scratch",
    "StagingBuffer",
    "StagingPool",
    "StagingShare",
    "VramTracker",
]
