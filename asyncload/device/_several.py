"""Allocating and freeing several, for devices that do so one after the other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from asyncload.device._contract import DeviceMemory, Recipient
from asyncload.interpreter_lock import UNHURRIED, Pause

__all__ = ["allocate_each", "allocate_until", "free_each"]


def allocate_each(
    sizes: Sequence[int], allocate: Callable[[int], DeviceMemory], free: Callable[[DeviceMemory], None]
) -> list[DeviceMemory]:
    """Makes ``allocate_all`` of a device's ``allocate`` and ``free``."""
    pause = Pause()
    memory: list[DeviceMemory] = []
    try:
        for nbytes in sizes:
            memory.append(allocate(nbytes))
            pause()
    except BaseException:
        for each in memory:
            free(each)
        raise
    return memory


def allocate_until(
    sizes: Sequence[int], allocate: Callable[[int], DeviceMemory], recipient: Recipient
) -> list[DeviceMemory]:
    """Makes ``allocate_some`` of a device's ``allocate``."""
    pause = Pause(UNHURRIED)  # what there is may be used meanwhile
    memory: list[DeviceMemory] = []
    for nbytes in sizes:
        try:
            memory.append(allocate(nbytes))
            recipient.give(memory[-1].address)
            pause()
        except Exception:  # noqa: BLE001 - what there is goes to its owner, whatever it was
            break
    return memory


def free_each(memory: Collection[DeviceMemory], free: Callable[[DeviceMemory], None]) -> dict[DeviceMemory, Exception]:
    """Makes ``free_all`` of a device's ``free``."""
    pause = Pause(UNHURRIED)
    failures: dict[DeviceMemory, Exception] = {}
    for each in memory:
        try:
            free(each)
        except Exception as error:  # noqa: BLE001 - the caller's to judge
            failures[each] = error
        pause()
    return failures
