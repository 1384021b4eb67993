"""Tensors as they land: ``async with loader.tensors(path) as tensors: async for tensor in tensors``."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Self

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from asyncload.errors import ClosedError
from asyncload.gguf import Header
from asyncload.interpreter_lock import waiting
from asyncload.loader._session import Request, Session
from asyncload.model import Tensor
from asyncload.pipeline import Engine, Hears
from asyncload.telemetry import ending

__all__ = ["TensorStream"]


class _Window(Session):
    """A session whose tensors are begun only while those begun and not yet taken stay within ``ahead`` bytes."""

    hears: Hears = "tensor"
    limits = True

    def __init__(self, engine: Engine, request: Request, ahead: int) -> None:
        super().__init__(engine, request)
        self._ahead = ahead
        self._outstanding = 0
        self.ready: deque[int] = deque()
        self.changed = anyio.Event()

    def prepare(self) -> None:
        """Makes plan and transfer; blocks."""
        self.make_plan()
        self.make_transfer()

    async def admit(self, tensors: Sequence[int]) -> None:
        nbytes = sum(self.plan.tensors[index].nbytes for index in tensors)
        while self._outstanding and self._outstanding + nbytes > self._ahead:
            await self.changed.wait()
        self._outstanding += nbytes
        await self.engine.callers.run(self.allocate, tensors)

    def landed(self, tensors: Sequence[int]) -> None:
        super().landed(tensors)
        self.ready.extend(tensors)
        self.wake()

    def take(self) -> Tensor:
        """Hands out the tensor that landed first, and makes room for more."""
        tensor = self.hand_out(self.ready.popleft())
        self._outstanding -= tensor.nbytes
        self.wake()
        return tensor

    def wake(self) -> None:
        """Lets everybody who waits look again."""
        changed, self.changed = self.changed, anyio.Event()
        changed.set()


class TensorStream:
    """A model's tensors, each once, in the order in which they land; made by ``Loader.tensors``.

    ``ahead`` (bytes) bounds what has been begun, or has landed, and was not yet taken; a tensor larger than that comes
    alone. While it is full, nothing is read and no staging memory is held. Leaving the ``async with`` block early ends
    the load; tensors that were taken stay valid, the others are freed. An error of the load is raised by the iteration,
    after the tensors that landed before it.
    """

    def __init__(self, scope: AbstractContextManager[Engine], request: Request, ahead: int) -> None:
        self._scope = scope
        self._request = request
        self._ahead = ahead
        self._session: _Window | None = None
        self._stack = AsyncExitStack()
        self._entered = False
        self._ended = False
        self._error: BaseException | None = None

    @property
    def header(self) -> Header:
        """The model's header; inside the ``async with`` block."""
        return self._active().opened.header

    async def __aenter__(self) -> Self:
        """Opens the model, plans the load and begins it."""
        if self._entered:
            raise ClosedError("a tensor stream is entered once")
        self._entered = True
        with waiting():
            await self._open()
        return self

    async def _open(self) -> None:
        """What entering the block does."""
        async with AsyncExitStack() as stack:  # what is entered first is left last
            stack.enter_context(ending(self._request.progress))
            engine = stack.enter_context(self._scope)
            session = _Window(engine, self._request, self._ahead)
            stack.push_async_callback(session.discard)
            await stack.enter_async_context(session.opened)
            await session.opened.open(self._request.path, session.prepare)
            group = anyio.create_task_group()
            await group.__aenter__()
            stack.push_async_exit(partial(_leave, group))
            group.start_soon(self._move, session)
            self._session = session
            self._stack = stack.pop_all()

    async def _move(self, session: _Window) -> None:
        try:
            await session.run()
            session.meter.done()
        except BaseException as error:
            session.meter.failed(error)
            if not isinstance(error, Exception):
                raise
            self._error = error  # the iteration raises it
        finally:
            self._ended = True
            session.wake()

    def __aiter__(self) -> AsyncIterator[Tensor]:
        """The tensors."""
        return self

    async def __anext__(self) -> Tensor:
        """Waits for the next tensor to land."""
        with waiting():  # also in the loop's turns, in which it gives the lock up
            return await self._next()

    async def _next(self) -> Tensor:
        await anyio.lowlevel.checkpoint()  # thousands of tensors may be ready
        session = self._active()
        while not session.ready:
            if self._error is not None:
                error, self._error = self._error, None
                try:
                    raise error
                finally:
                    del error  # it refers to this frame
            if self._ended:
                raise StopAsyncIteration
            await session.changed.wait()
        return session.take()

    def _active(self) -> _Window:
        if self._session is None:
            raise ClosedError("a tensor stream is used inside its `async with` block")
        return self._session

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        """Ends the load, waits until nothing of it is under way, and frees what was not taken."""
        self._session = None
        with waiting():
            return await self._stack.__aexit__(kind, error, trace)


async def _leave(group: TaskGroup, *_: object) -> None:
    """Ends a task group whose tasks keep their errors; the body's exception goes on as it is, in no group."""
    group.cancel_scope.cancel()
    await group.__aexit__(None, None, None)
