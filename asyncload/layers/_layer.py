"""A layer in a consumer's hands."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Final, Self

from asyncload.device import Device, Event
from asyncload.errors import ClosedError, OptionsError, TensorNotFoundError
from asyncload.interpreter_lock import waiting
from asyncload.layers._scheduler import Scheduler
from asyncload.layers._sweep import Ride, Use, Work
from asyncload.model import Tensor

__all__ = ["Layer"]

# Makes the tensors of a layer, which are its views of a slot, or of resident memory.
MakeTensors = Callable[[], Mapping[str, Tensor]]


class Layer(Mapping[str, Tensor]):
    """One layer of one sweep: its tensors by their names within the layer (``"attn_q.weight"``), inside of ``on``.

    ``number`` is the layer's, ``resident`` says that it stays on the device.
    """

    def __init__(
        self,
        number: int,
        device: Device,
        make_tensors: MakeTensors,
        *,
        scheduler: Scheduler,
        ride: Ride,
        use: Use | None,
    ) -> None:
        self.number: Final = number
        self.resident: Final = use is None
        self._device = device
        self._make_tensors = make_tensors
        self._scheduler = scheduler
        self._ride = ride
        self._work: Work | None = ride.sweep.resident[number] if use is None else use  # until it is used
        self._tensors: Mapping[str, Tensor] | None = None

    @contextmanager
    def on(self, stream: object = None) -> Generator[Self]:
        """The block in which the layer's tensors can be used, by work that is enqueued on ``stream``.

        The stream (``cuda.core``'s, torch's, CuPy's, or a handle) waits for the layer to arrive; at the end of the
        block, however it ends, an event is recorded on it, and what it was given to do until then keeps the slot. Views
        that were made of the tensors are invalid afterwards. On the host device there may be no stream: the layer has
        arrived, and the block is the work. In the block the interpreter's switch interval is shortened, as where one
        waits.

        Raises ``ClosedError`` for a layer that was used or has passed, ``StalledError`` if the ride was left behind,
        ``OptionsError`` where a stream is needed, ``DeviceError`` for what is no stream of the device.
        """
        work = self._work
        if work is None:
            raise ClosedError(f"layer {self.number} has been used")
        if stream is None and self._device.info.needs_stream:
            raise OptionsError("work on a layer needs a stream: layer.on(stream)", option="stream")
        adopted = None if stream is None else self._device.adopt(stream)
        self._work = None  # it holds its sweep, and that those after it: who keeps the layer keeps none
        with waiting():  # for the lock, with each call of the driver that gives it up, while the slot is kept
            self._scheduler.enter(self._ride, work, adopted)
            try:
                if adopted is None:
                    work.untimed = True
                else:
                    work.begin(self._ride, *adopted.begin(work.fed.arrived if isinstance(work, Use) else ()))
                self._tensors = self._make_tensors()
                yield self
            finally:
                tensors, self._tensors = self._tensors or {}, None
                for tensor in tensors.values():
                    tensor.close()
                ended: Event | None = None
                try:
                    ended = None if adopted is None else adopted.end()
                finally:
                    self._scheduler.finish(self._ride, work, ended)

    def skip(self) -> None:
        """Gives the layer back unused; its ride's next step does that too."""
        work, self._work = self._work, None
        if isinstance(work, Use):
            self._scheduler.finish(self._ride, work)

    def __getitem__(self, name: str) -> Tensor:
        """A tensor by its name within the layer; raises ``TensorNotFoundError``, ``ClosedError`` outside of ``on``."""
        tensors = self._open()
        if name not in tensors:
            raise TensorNotFoundError(f"layer {self.number} has no {name!r}", name=name)
        return tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._open())

    def __len__(self) -> int:
        return len(self._open())

    # A layer is a place in time: it equals itself alone.
    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def _open(self) -> Mapping[str, Tensor]:
        if self._tensors is None:
            raise ClosedError(f"layer {self.number} is used inside of `with layer.on(stream)`")
        return self._tensors
