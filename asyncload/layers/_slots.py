"""What layers pass through."""

from __future__ import annotations

from dataclasses import dataclass, field

from asyncload.device import DeviceMemory, Event
from asyncload.memory import Allocation

__all__ = ["Slot"]


@dataclass(eq=False, slots=True)
class Slot:
    """Device memory that layers pass through; ``busy``: what must have passed before it is written again."""

    index: int
    allocation: Allocation
    busy: list[Event] = field(default_factory=list[Event])

    @property
    def memory(self) -> DeviceMemory:
        """Its range."""
        return self.allocation.memory
