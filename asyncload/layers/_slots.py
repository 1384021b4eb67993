"""What layers pass through."""

from __future__ import annotations

from typing import Final

from asyncload.device import DeviceMemory, Event
from asyncload.errors import ClosedError
from asyncload.memory import Allocation

__all__ = ["Slot"]


class Slot:
    """Device memory that layers pass through; ``busy``: what must have passed before it is written again."""

    def __init__(self, index: int, allocation: Allocation) -> None:
        self.index: Final = index
        self.memory: Final[DeviceMemory] = allocation.memory
        self.busy: list[Event] = []
        self._allocation: Allocation | None = allocation

    @property
    def allocation(self) -> Allocation:
        """What owns the memory; raises ``ClosedError`` when closed."""
        if self._allocation is None:
            raise ClosedError(f"slot {self.index} has been closed, with its layer stream")
        return self._allocation

    def close(self) -> None:
        """Lets the memory go; the tensors of a layer that is in use hold it until they are closed."""
        self._allocation = None
