"""The same front door for programs without an event loop.

Each loader runs an event loop on a thread of its own, so this works inside a Jupyter cell's running loop too. Ctrl-C
ends the call under way as a cancellation does, and raises ``KeyboardInterrupt`` once that is done.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, Generic, Self, TypeVar

import anyio
from anyio.from_thread import BlockingPortal, start_blocking_portal

from asyncload import loader as _loader
from asyncload.device import Device
from asyncload.errors import ClosedError
from asyncload.gguf import Header
from asyncload.loader._open import ModelPath
from asyncload.model import Model, Partial, Tensor
from asyncload.options import Options
from asyncload.plan import DtypeSpec, Selection
from asyncload.telemetry import ProgressCallback

__all__ = ["Loader", "load", "read_header"]

T = TypeVar("T")


def read_header(path: ModelPath, *, strict: bool = False) -> Header:
    """``asyncload.read_header`` for a program without an event loop."""
    with _portal() as portal:
        return _call(portal, lambda: _loader.read_header(path, strict=strict))


def load(
    path: ModelPath, *, device: str | Device | None = None, options: Options | None = None, **request: Any
) -> Model:
    """``asyncload.load`` for a program without an event loop."""
    with Loader(device, options=options) as loader:
        return loader.load(path, **request)


class Loader:
    """``asyncload.Loader`` as a plain context manager; its methods block."""

    def __init__(self, device: str | Device | None = None, *, options: Options | None = None) -> None:
        self._loader = _loader.Loader(device, options=options)
        self._portal: BlockingPortal | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Starts the loop's thread and opens the device."""
        with ExitStack() as stack:
            portal = stack.enter_context(_portal())
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
        _call(self._active(), lambda: self._loader.warm_up(dtypes))

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
        return _call(
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
        left = portal.call(anyio.Event)
        entered: Future[None] = Future()

        async def hold() -> None:  # entered and left in one task
            async with stream:
                entered.set_result(None)
                await left.wait()

        task = _Task(portal, hold)
        with task.interruptible():
            task.start()
            wait((entered, task.future), return_when=FIRST_COMPLETED)
        try:
            if entered.done():
                yield _iterate(portal, stream)
                portal.call(left.set)
            with task.interruptible():
                task.future.result()
        except BaseException:
            task.cancel()
            raise


def _iterate(portal: BlockingPortal, stream: _loader.TensorStream) -> Iterator[Tensor]:
    while True:
        try:
            tensor = _call(portal, stream.__anext__)
        except StopAsyncIteration:
            return
        yield tensor


def _portal() -> AbstractContextManager[BlockingPortal]:
    return start_blocking_portal("asyncio")


def _call(portal: BlockingPortal, function: Callable[[], Awaitable[T]]) -> T:
    """Runs a coroutine in the portal's loop; an interrupt cancels it and waits for its end."""
    task = _Task(portal, function)
    with task.interruptible():
        task.start()
        return task.future.result()
    raise AssertionError("the block returns or raises")


class _Task(Generic[T]):
    """A coroutine that runs in the portal's loop once it is started."""

    future: Future[T]

    def __init__(self, portal: BlockingPortal, function: Callable[[], Awaitable[T]]) -> None:
        self._portal = portal
        self._function = function
        self._started = False
        self._ended = threading.Event()

    def start(self) -> None:
        """Starts it, or is interrupted and does not: nothing in between."""
        with _interrupt_deferred():
            self.future = self._portal.start_task_soon(self._run)
            self._started = True

    async def _run(self) -> T:
        try:
            return await self._function()
        finally:
            self._ended.set()

    def cancel(self) -> None:
        """Cancels it and waits for its end; impatience does not make that any faster."""
        cancelled = False
        while self._started and not self._ended.is_set():
            with suppress(KeyboardInterrupt):
                cancelled = cancelled or self.future.cancel() or True
                self._ended.wait()

    @contextmanager
    def interruptible(self) -> Generator[None]:
        """Cancels it when the block, which waits for it, is interrupted."""
        try:
            yield
        except KeyboardInterrupt:
            self.cancel()
            raise


@contextmanager
def _interrupt_deferred() -> Generator[None]:
    """Holds an interrupt back until the block has ended; only the main thread can be interrupted."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received:
            handler(*received[0])
