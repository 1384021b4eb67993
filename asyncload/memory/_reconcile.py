"""The ledger held against the driver."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from asyncload.device import Device
from asyncload.memory._ledger import Entry
from asyncload.plan import ALLOCATION_BLOCK

__all__ = ["CONTEXT_GROWTH", "Baseline", "Reconciliation"]

# Bytes that a context may take for itself after it was made: streams, loaded kernels, tables of pinned memory.
CONTEXT_GROWTH: Final = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconciliation:
    """What the ledger and the driver say of the change, in bytes, since the ledger was opened.

    ``source`` says of whom the driver spoke: of this ``"process"``, or of the whole ``"device"``, where other
    processes' memory counts too. ``tolerance``: what rounding each range up to blocks of 2 MiB adds, and 64 MiB by
    which the context may have grown.
    """

    ledger_change: int
    driver_change: int
    tolerance: int
    source: Literal["process", "device"]

    @property
    def difference(self) -> int:
        """What the driver says more than the ledger: above zero, memory was taken past the ledger."""
        return self.driver_change - self.ledger_change

    @property
    def within(self) -> bool:
        """Whether the two agree within the tolerance."""
        return abs(self.difference) <= self.tolerance


class Baseline:
    """What the driver says when a ledger is opened; asks it, and so may block."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._process = device.process_memory()
        self._free = device.memory().free

    def reconcile(self, entries: Iterable[Entry]) -> Reconciliation:
        """Holds all lines of the ledger, which was empty then, against what the driver says now."""
        sizes = [entry.memory.nbytes for entry in entries]
        process = None if self._process is None else self._device.process_memory()
        by_process = None if self._process is None or process is None else process - self._process
        return Reconciliation(
            ledger_change=sum(sizes),
            driver_change=self._free - self._device.memory().free if by_process is None else by_process,
            tolerance=CONTEXT_GROWTH + sum(-size % ALLOCATION_BLOCK for size in sizes),
            source="device" if by_process is None else "process",
        )
