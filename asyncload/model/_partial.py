"""What a failed load leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from asyncload.device import DeviceInfo
from asyncload.errors import ClosedError
from asyncload.model._tensor import Tensor

__all__ = ["Partial"]


class Partial:
    """The tensors that arrived before a load failed for good, for another load to go on from.

    It owns them until it is closed, or used by a load. ``names`` and ``nbytes`` say what arrived, also afterwards;
    ``identity`` is that of the sources that the tensors came from, opaque and to be compared; ``device`` is where they
    lie.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, identity: object, device: DeviceInfo) -> None:
        self._tensors: dict[str, Tensor] | None = dict(tensors)
        self.names: Final = tuple(tensors)
        self.nbytes: Final = sum(tensor.nbytes for tensor in tensors.values())
        self.identity: Final = identity
        self.device: Final = device

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors by name. Raises ``ClosedError`` when closed or used."""
        return dict(self._open())

    @property
    def closed(self) -> bool:
        """Whether it has been closed or used."""
        return self._tensors is None

    def take(self) -> dict[str, Tensor]:
        """Hands the tensors over, open, and is closed. Raises ``ClosedError`` the second time."""
        tensors = self._open()
        self._tensors = None
        return tensors

    def close(self) -> None:
        """Closes the tensors that it still owns; further calls do nothing."""
        tensors, self._tensors = self._tensors, None
        for tensor in (tensors or {}).values():
            tensor.close()

    def __repr__(self) -> str:
        state = ", closed" if self.closed else ""
        return f"Partial({len(self.names)} tensors, {self.nbytes} bytes, device={self.device.name!r}{state})"

    def _open(self) -> dict[str, Tensor]:
        if self._tensors is None:
            raise ClosedError("the partial result of this load has been closed, or another load went on from it")
        return self._tensors
