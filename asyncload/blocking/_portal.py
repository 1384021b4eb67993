"""Calls into an event loop that runs on a thread of its own; an interrupt ends them as a cancellation does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager, suppress
from types import FrameType
from typing import Any, Generic, ParamSpec, TypeVar

import anyio
from anyio.from_thread import BlockingPortal, start_blocking_portal

from asyncload.errors import ClosedError

__all__ = ["BlockingPortal", "at_once", "call", "entered", "open_portal"]

P = ParamSpec("P")
T = TypeVar("T")


def open_portal() -> AbstractContextManager[BlockingPortal]:
    """Starts a loop and its thread, and ends them with the block."""
    return start_blocking_portal("asyncio")


def at_once(portal: BlockingPortal, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls a function that does not wait, on the loop's thread; an interrupt comes once it has ended.

    Raises what the function raises, and ``ClosedError`` where the loop has ended.
    """

    async def run() -> T:
        return function(*args, **kwargs)

    with _interrupt_deferred():
        return _start(portal, run).result()
    raise AssertionError("the block returns or raises")


def call(portal: BlockingPortal, function: Callable[[], Awaitable[T]]) -> T:
    """Runs a coroutine in the loop; an interrupt cancels it and waits for its end.

    Raises what the coroutine raises, and ``ClosedError`` where the loop has ended.
    """
    task = _Task(portal, function)
    with task.interruptible():
        task.start()
        return task.future.result()
    raise AssertionError("the block returns or raises")


@contextmanager
def entered(portal: BlockingPortal, context: AbstractAsyncContextManager[T]) -> Generator[T]:
    """A context that is entered and left in one task of the loop; an interrupt cancels that task."""
    left = at_once(portal, anyio.Event)
    inside: Future[T] = Future()

    async def hold() -> None:
        async with context as value:
            inside.set_result(value)
            await left.wait()

    task = _Task(portal, hold)
    with task.interruptible():
        task.start()
        either: list[Future[Any]] = [inside, task.future]
        wait(either, return_when=FIRST_COMPLETED)
    try:
        if inside.done():
            yield inside.result()
            at_once(portal, left.set)
        with task.interruptible():
            task.future.result()
    except BaseException:
        task.cancel()
        raise


def _start(portal: BlockingPortal, function: Callable[[], Awaitable[T]]) -> Future[T]:
    try:
        return portal.start_task_soon(function)
    except RuntimeError as error:
        raise ClosedError("the loader has been closed") from error


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
            self.future = _start(self._portal, self._run)
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
