"""A loaded model: its tensors by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Final, Self

from asyncload.device import DeviceInfo
from asyncload.errors import ClosedError, TensorNotFoundError
from asyncload.gguf import Header
from asyncload.model._tensor import Tensor

__all__ = ["Model"]


class Model(Mapping[str, Tensor]):
    """The tensors of a load by name, in the order given, with the ``header`` that they came from.

    ``device`` is where they lie, ``stats`` what the loader measured. It is a context manager: at the end of the block
    it is closed. It never waits and may be closed on any thread.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, header: Header, device: DeviceInfo, stats: Any = None) -> None:
        self._tensors: dict[str, Tensor] | None = dict(tensors)
        self.header: Final = header
        self.device: Final = device
        self.stats: Final = stats
        self.nbytes: Final = sum(tensor.nbytes for tensor in tensors.values())

    @property
    def layers(self) -> Mapping[int, tuple[Tensor, ...]]:
        """The loaded tensors of each layer (``blk.N.``) by number, ascending. Raises ``ClosedError`` when closed."""
        tensors, layers = self._open(), dict[int, tuple[Tensor, ...]]()
        for layer, infos in self.header.layers.items():
            loaded = tuple(tensors[info.name] for info in infos if info.name in tensors)
            if loaded:
                layers[layer] = loaded
        return layers

    @property
    def closed(self) -> bool:
        """Whether the model has been closed."""
        return self._tensors is None

    def close(self) -> None:
        """Closes all tensors; memory is freed when the last view of it is dropped. Further calls do nothing."""
        tensors, self._tensors = self._tensors, None
        for tensor in (tensors or {}).values():
            tensor.close()

    def __getitem__(self, name: str) -> Tensor:
        """A tensor by its name; raises ``TensorNotFoundError``, and ``ClosedError`` when closed."""
        tensors = self._open()
        if name not in tensors:
            why = "was not selected when the model was loaded" if name in self.header.tensors else "is not in the model"
            raise TensorNotFoundError(f"{name!r} {why}", name=name)
        return tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._open())

    def __len__(self) -> int:
        return len(self._open())

    # A model is the owner of memory, so it equals itself alone, and can be a key.
    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._tensors is None else f"{len(self._tensors)} tensors, {self.nbytes} bytes"
        return f"Model({state}, device={self.device.name!r})"

    def _open(self) -> dict[str, Tensor]:
        if self._tensors is None:
            raise ClosedError("the model has been closed")
        return self._tensors
