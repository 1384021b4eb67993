"""The same front door for programs without an event loop.

Each loader runs an event loop on a thread of its own, so this works inside a Jupyter cell's running loop too. Ctrl-C
ends the call under way as a cancellation does, and raises ``KeyboardInterrupt`` once that is done.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Literal, Self

from asyncload import loader as _loader
from asyncload.blocking._layers import Layer, LayerRide, LayerStream
from asyncload.blocking._portal import BlockingPortal, call, entered, open_portal
from asyncload.device import Device
from asyncload.errors import ClosedError
from asyncload.gguf import Header
from asyncload.loader._open import ModelPath
from asyncload.model import Model, Partial, Tensor
from asyncload.options import Options
from asyncload.plan import DtypeSpec, Mode, Selection
from asyncload.telemetry import ProgressCallback

__all__ = ["Layer", "LayerRide", "LayerStream", "Loader", "load", "read_header", "stream"]


def read_header(path: ModelPath, *, strict: bool = False) -> Header:
    """``asyncload.read_header`` for a program without an event loop."""
    with open_portal() as portal:
        return call(portal, lambda: _loader.read_header(path, strict=strict))


def load(
    path: ModelPath, *, device: str | Device | None = None, options: Options | None = None, **request: Any
) -> Model:
    """``asyncload.load`` for a program without an event loop."""
    with Loader(device, options=options) as loader:
        return loader.load(path, **request)


@contextmanager
def stream(
    path: ModelPath, *, device: str | Device | None = None, options: Options | None = None, **request: Any
) -> Generator[LayerStream]:
    """``asyncload.stream`` for a program without an event loop."""
    with Loader(device, options=options) as loader, loader.stream(path, **request) as layers:
        yield layers


class Loader:
    """``asyncload.Loader`` as a plain context manager; its methods block."""

    def __init__(self, device: str | Device | None = None, *, options: Options | None = None) -> None:
        self._loader = _loader.Loader(device, options=options)
        self._portal: BlockingPortal | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Starts the loop's thread and opens the device."""
        with ExitStack() as stack:
            portal = stack.enter_context(open_portal())
            stack.enter_context(portal.wrap_async_context_manager(self._loader))
            self._portal = portal
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the loader and ends the thread; models and tensors stay valid."""
        self._portal = None
        self._stack.__exit__(kind, error, trace)

    def _active(self) -> BlockingPortal:
        if self._portal is None:
            raise ClosedError("a loader is used inside its `with` block")
        return self._portal

    def warm_up(self, dtypes: Iterable[str] = ("float32", "float16", "bfloat16")) -> None:
        """``asyncload.Loader.warm_up``."""
        call(self._active(), lambda: self._loader.warm_up(dtypes))

    def load(
        self,
        path: ModelPath,
        *,
        dtype: DtypeSpec = "packed",
        select: Selection = None,
        into: Mapping[str, Any] | None = None,
        progress: ProgressCallback | None = None,
        resume: Partial | None = None,
    ) -> Model:
        """``asyncload.Loader.load``; ``progress`` is called on the loop's thread."""
        return call(
            self._active(),
            lambda: self._loader.load(path, dtype=dtype, select=select, into=into, progress=progress, resume=resume),
        )

    @contextmanager
    def tensors(
        self,
        path: ModelPath,
        *,
        ahead: int = 256 << 20,
        dtype: DtypeSpec = "packed",
        select: Selection = None,
        progress: ProgressCallback | None = None,
    ) -> Generator[Iterator[Tensor]]:
        """``asyncload.Loader.tensors``: ``with loader.tensors(path) as tensors: for tensor in tensors: ...``."""
        portal = self._active()
        stream = self._loader.tensors(path, ahead=ahead, dtype=dtype, select=select, progress=progress)
        with entered(portal, stream):
            yield _iterate(portal, stream)

    @contextmanager
    def stream(
        self,
        path: ModelPath,
        *,
        dtype: DtypeSpec = "packed",
        slots: int = 2,
        allow: Collection[Mode] = ("full", "hybrid", "stream"),
        free: int | None = None,
        host: Literal["auto", "slabs", "file"] = "auto",
        trace: bool = False,
        **memory: Any,
    ) -> Generator[LayerStream]:
        """``asyncload.Loader.stream``: ``with loader.stream(path) as layers: for layer in layers: ...``."""
        portal = self._active()
        stream = self._loader.stream(
            path, dtype=dtype, slots=slots, allow=allow, free=free, host=host, trace=trace, **memory
        )
        with entered(portal, stream):
            yield LayerStream(portal, stream)


def _iterate(portal: BlockingPortal, stream: _loader.TensorStream) -> Iterator[Tensor]:
    while True:
        try:
            tensor = call(portal, stream.__anext__)
        except StopAsyncIteration:
            return
        yield tensor
