"""A model whose layers pass through slots, for threads without an event loop."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType
from typing import Final, Literal, Self

from asyncload import layers as _layers
from asyncload import loader as _loader
from asyncload.blocking._portal import BlockingPortal, at_once, call
from asyncload.errors import ClosedError
from asyncload.gguf import Header
from asyncload.layers import PassStats
from asyncload.model import Model, Tensor
from asyncload.plan import Plan

__all__ = ["Layer", "LayerRide", "LayerStream"]


class Layer(Mapping[str, Tensor]):
    """``asyncload.Layer``: one layer of one sweep, its tensors by their names within the layer, inside of ``on``."""

    def __init__(self, portal: BlockingPortal, layer: _layers.Layer) -> None:
        self.number: Final = layer.number
        self.resident: Final = layer.resident
        self._portal = portal
        self._layer = layer

    @contextmanager
    def on(self, stream: object = None) -> Generator[Self]:
        """``asyncload.Layer.on``."""
        block = ExitStack()  # entered and left on the loop's thread, where layers are counted
        try:
            at_once(self._portal, block.enter_context, self._layer.on(stream))
            yield self
        finally:
            try:
                at_once(self._portal, block.close)
            except ClosedError:  # the loop has ended, and nobody counts there any more
                block.close()

    def __getitem__(self, name: str) -> Tensor:
        """A tensor by its name within the layer; raises ``TensorNotFoundError``, ``ClosedError`` outside of ``on``."""
        return self._layer[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layer)

    def __len__(self) -> int:
        return len(self._layer)

    # A layer is a place in time: it equals itself alone.
    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


class LayerRide:
    """``asyncload.loader.LayerRide``: each ``for`` over it is one sweep; one thread at a time uses it."""

    def __init__(self, portal: BlockingPortal, ride: _loader.LayerRide) -> None:
        self._portal = portal
        self._ride = ride

    def __iter__(self) -> Self:
        """The sweep that it is in, or the next one."""
        return self

    def __next__(self) -> Layer:
        """Waits for the next layer; raises what the iteration of ``asyncload.loader.LayerRide`` raises."""
        try:
            return Layer(self._portal, call(self._portal, self._ride.__anext__))
        except StopAsyncIteration:
            raise StopIteration from None

    def close(self) -> None:
        """Gives the place up; a layer that is in use stays the ride's until its block has ended."""
        with suppress(ClosedError):
            at_once(self._portal, self._ride.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LayerStream:
    """``asyncload.LayerStream`` inside of its block: ``for layer in layers`` is a sweep; any thread may ride."""

    def __init__(self, portal: BlockingPortal, stream: _loader.LayerStream) -> None:
        self._portal = portal
        self._stream = stream

    @property
    def header(self) -> Header:
        """The model's header."""
        return self._stream.header

    @property
    def plan(self) -> Plan:
        """What is where, and what that takes."""
        return self._stream.plan

    @property
    def host(self) -> Literal["slabs", "file"]:
        """Where the layers that stream come from."""
        return self._stream.host

    @property
    def resident(self) -> Model:
        """What stays on the device: all that belongs to no layer, and the layers that do not stream."""
        return self._stream.resident

    def join(self) -> LayerRide:
        """A ride in the next sweep, beside those of other threads."""
        return LayerRide(self._portal, at_once(self._portal, self._stream.join))

    def last_pass(self) -> PassStats:
        """``asyncload.LayerStream.last_pass``."""
        return call(self._portal, self._stream.last_pass)

    def __iter__(self) -> LayerRide:
        """One sweep."""
        return LayerRide(self._portal, at_once(self._portal, self._stream.__aiter__))
