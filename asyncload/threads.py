"""Threads that run blocking calls for an event loop, and keep their word under cancellation.

``anyio.to_thread`` leaves its thread running when a native asyncio cancellation pierces its shield. Here the one who
awaits a call never goes on before the call has ended, however often he is cancelled; so whatever a task lends to its
thread, the thread has given back when the task runs again.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import Context, copy_context
from functools import partial
from typing import Any, ParamSpec, TypeVar, cast

import anyio
from anyio.lowlevel import cancel_shielded_checkpoint, current_token

__all__ = ["LoopHandle", "Threads", "is_own_thread", "lower_priority", "run_in_thread", "settle"]

P = ParamSpec("P")
T = TypeVar("T")

_LOWEST_NICE = 19


class LoopHandle:
    """The running event loop, kept so that other threads can post calls to it."""

    def __init__(self) -> None:
        native = cast("Any", current_token().native_token)
        # asyncio's and trio's names for the same thing; both wake the loop and return at once
        self._post: Callable[..., object] = getattr(native, "run_sync_soon", None) or partial(
            native.call_soon_threadsafe, context=_context_of_asyncio()
        )

    def post(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Has the loop call ``function`` soon; does nothing when the loop has ended, as nobody waits in it then."""
        with suppress(RuntimeError):
            self._post(function, *args, **kwargs)


def _context_of_asyncio() -> Context:
    """One in which calls that are no task's know their loop: anyio asks sniffio, if that is there, which asks tasks."""
    context = copy_context()
    if (sniffio := sys.modules.get("sniffio")) is not None:
        context.run(sniffio.current_async_library_cvar.set, "asyncio")
    return context


async def settle(event: anyio.Event) -> None:
    """Waits for ``event`` however often the caller is cancelled, and delivers the cancellation afterwards."""
    try:
        await event.wait()
    except anyio.get_cancelled_exc_class():
        with anyio.CancelScope(shield=True):
            while not event.is_set():
                with suppress(anyio.get_cancelled_exc_class()):  # a native one of asyncio's pierces the shield
                    await event.wait()
        raise


async def _outcome(future: Future[T]) -> T:
    """The result of a call on another thread, awaited to its end."""
    ended, loop = anyio.Event(), LoopHandle()
    future.add_done_callback(lambda _: loop.post(ended.set))
    try:
        await settle(ended)
        return future.result()
    finally:
        del future  # an error that it holds refers to this frame


class Threads:
    """A fixed number of named threads; ``nice`` is added to their niceness."""

    def __init__(self, count: int, name: str, *, nice: int = 0) -> None:
        self._executor = ThreadPoolExecutor(count, name, initializer=lower_priority, initargs=(nice,))

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs ``function`` on one of the threads and returns what it returns, or raises what it raises.

        A cancellation is delivered once the call has ended. The result is lost then, so a call that opens something
        puts it where its owner finds it.
        """
        return await _outcome(self._executor.submit(function, *args, **kwargs))

    def close(self) -> None:
        """Waits for calls under way and ends the threads; blocks."""
        self._executor.shutdown(wait=True)


async def run_in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs one blocking call on a thread of its own, as ``Threads.run`` does; the thread has ended on return."""
    future: Future[T] = Future()

    def call() -> None:
        try:
            result = function(*args, **kwargs)
        except BaseException as error:  # noqa: BLE001 - it is the awaiting task's
            future.set_exception(error)
        else:
            future.set_result(result)

    thread = threading.Thread(target=call, name="asyncload-once")
    thread.start()
    try:
        return await _outcome(future)
    finally:
        while thread.is_alive():  # the call has ended, so the thread is at its last instructions
            await cancel_shielded_checkpoint()


def is_own_thread() -> bool:
    """Whether the calling thread is one that asyncload has started, by its name."""
    return threading.current_thread().name.startswith("asyncload-")


def lower_priority(nice: int) -> None:
    """Adds to the calling thread's niceness (Linux keeps it for each thread)."""
    thread = threading.get_native_id()
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, min(os.getpriority(os.PRIO_PROCESS, thread) + nice, _LOWEST_NICE))
