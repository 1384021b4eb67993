"""What holds a line in the ledger: an allocation of the tracker's, or memory of somebody else's."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, Self

from asyncload.device import DeviceMemory
from asyncload.memory._ledger import Entry, Purpose

__all__ = ["Allocation", "Dropped", "Reclaim", "Registration"]


class Dropped(NamedTuple):
    """Memory to free, once the device's work has ended; at once where it is ``unused``."""

    entry: Entry
    unused: bool = False


# What the reclaim thread is handed: memory, or an event to set once all that came before it is freed.
Reclaim = queue.SimpleQueue[Dropped | threading.Event]


class _Line:
    """What a line of the ledger says."""

    __slots__ = ("_entry",)

    def __init__(self, entry: Entry) -> None:
        self._entry = entry

    @property
    def memory(self) -> DeviceMemory:
        """The range of device memory; not to be used any more after ``close``."""
        return self._entry.memory

    @property
    def address(self) -> int:
        """Where the memory starts; 0 when it is empty."""
        return self._entry.memory.address

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self._entry.memory.nbytes

    @property
    def purpose(self) -> Purpose:
        """What it is for."""
        return self._entry.purpose

    @property
    def description(self) -> str:
        """What it holds, for people."""
        return self._entry.description

    def __repr__(self) -> str:
        name = type(self).__name__
        return f"{name}({self.nbytes} bytes at {self.address:#x}, {self.purpose}, {self.description!r})"


class Allocation(_Line):
    """Device memory that lives as long as this object, or until ``close``.

    The last reference may be dropped, and ``close`` called, on any thread, and while enqueued work still uses the
    memory: it is freed by the tracker's thread, after all work that was enqueued on the device before.
    """

    __slots__ = ("__weakref__", "_owned", "_reclaim")

    def __init__(self, entry: Entry, reclaim: Reclaim) -> None:
        super().__init__(entry)
        self._reclaim = reclaim
        self._owned = [entry] if entry.memory.nbytes else []  # popped by whoever lets go first

    def close(self, *, unused: bool = False) -> None:
        """Lets the memory go; further calls do nothing. Never blocks.

        ``unused`` says that all work on the memory is known to have ended: then nothing is waited for, and the driver
        is not asked about others' streams, which would end a capture of a CUDA graph on one of them.
        """
        # A finalizer runs wherever the garbage collector happens to, also inside a locked region of this thread.
        # ``SimpleQueue.put`` may be called there; a lock may not be taken.
        try:
            entry = self._owned.pop()
        except IndexError:
            return
        self._reclaim.put(Dropped(entry, unused))

    def __del__(self) -> None:
        self.close()


class Registration(_Line):
    """Somebody else's device memory in the ledger, until ``close`` or the end of its ``with`` block.

    It owns nothing and frees nothing. Dropped without ``close``, it leaves the memory in the ledger.
    """

    __slots__ = ("_owned", "_unregister")

    def __init__(self, entry: Entry, unregister: Callable[[Entry], None]) -> None:
        super().__init__(entry)
        self._unregister = unregister
        self._owned = [entry]  # popped by whoever lets go first

    def close(self) -> None:
        """Takes the memory out of the ledger, before its owner frees it; further calls do nothing."""
        try:
            entry = self._owned.pop()
        except IndexError:
            return
        self._unregister(entry)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
