"""What moves bytes: the contract of its two implementations, and of those who have bytes moved."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal, Protocol

from asyncload.device import DeviceMemory, Event, Recipient
from asyncload.memory import Scratch
from asyncload.options import Options
from asyncload.pipeline._stats import LoadStats
from asyncload.plan import LoadPlan
from asyncload.source import Source

__all__ = ["Backend", "Hears", "Sink", "Transfer"]

Hears = Literal["chunk", "tensor", "end"]


class Sink:
    """What a transfer asks of the one who runs it; on the event loop.

    ``hears`` of what happens as it happens, at least: of chunks that have moved, of tensors that have landed, or of
    nothing before the end; what it need not hear at once it may be told later. ``limits`` says that ``admit`` may wait.
    ``after`` are the events after which the targets may be written; the device waits for them.
    """

    hears: Hears = "chunk"
    limits: bool = False
    after: Sequence[Event] = ()

    async def admit(self, tensors: Sequence[int]) -> None:
        """Waits until the tensors of a new group may be moved; called once for each group, in order."""

    def target(self, tensor: int) -> DeviceMemory:
        """Where a tensor goes; its group has been admitted."""
        raise NotImplementedError

    def landed(self, tensors: Sequence[int]) -> None:
        """All bytes of these tensors are on the device, in the order in which they came."""

    def moved(self, nbytes: int) -> None:
        """That many bytes more of the tensors are on the device."""


class Transfer(Protocol):
    """Moves the tensors of a plan from their sources into device memory, once.

    ``prepare`` and ``run`` are called in this order, ``end`` at last; where the sink does not limit, ``admit`` before
    ``run``, and ``recipient`` before that, if at all.
    """

    def prepare(self) -> None:
        """Takes what it needs beside staging memory; blocks. Raises what the scratch's allocation raises.

        Where the sink does not limit, bytes may be read into staging memory from here on.
        """
        ...

    def recipient(self, tensors: Sequence[int]) -> Recipient | None:
        """Who takes the targets of these tensors, in order, and has them moved meanwhile; all others have theirs.

        None where nothing moves before ``run``. Not where the sink limits; on any thread.
        """
        ...

    def admit(self) -> None:
        """Says that all tensors have their targets, if the sink does not limit; on any thread."""
        ...

    def stats(self) -> LoadStats:
        """Where its time went, until now."""
        ...

    @property
    def copies(self) -> Callable[[], Sequence[Sequence[tuple[Event, Event]]]]:
        """Gives, by stream, the events before and behind each chunk's copies and kernels, if it is timed; once run."""
        ...

    async def run(self) -> None:
        """Moves everything; returns when the last event has passed.

        All tensors are admitted. Raises the first error of a source, a copy or the sink. However it ends, no thread and
        no copy of this transfer is under way any more, and all staging memory is back.
        """
        ...

    async def end(self) -> None:
        """Gives back what ``prepare`` took; what was admitted or read, and never run, is given up and waited for."""
        ...


class Backend(Protocol):
    """Threads, streams and staging memory that move bytes for all loads of a loader; closing it blocks.

    ``options`` are the loader's with the sizes that suit this backend, ``scratch`` is what its streams decode in.
    """

    @property
    def options(self) -> Options: ...
    @property
    def scratch(self) -> Scratch: ...
    def transfer(
        self, plan: LoadPlan, sources: Sequence[Source], sink: Sink, *, skip: Collection[int] = (), timed: bool = False
    ) -> Transfer:
        """A transfer of a plan's tensors, but for those to skip, by their index; on any thread.

        If it is ``timed``, events are recorded around its copies.
        """
        ...

    @property
    def idle(self) -> bool:
        """Whether no staging buffer is in use."""
        ...

    def close(self) -> None: ...
