from __future__ import annotations

import pytest

from asyncload.device import HostDevice
from asyncload.device._host_stream import PassedAll
from asyncload.errors import DeviceError, OutOfDeviceMemoryError
from asyncload.memory import Purpose, Scratch, VramTracker


def test_buffers_are_shared_by_all_and_freed_by_the_last() -> None:
    device = HostDevice(poison=True)
    tracker = VramTracker(device)
    scratch = Scratch(tracker, 4096, 3)
    assert tracker.total == 0
    first = scratch.acquire()
    assert len({memory.address for memory in first}) == 3
    assert [memory.nbytes for memory in first] == [4096] * 3
    assert tracker.by_purpose() == {Purpose.SCRATCH: 3 * 4096}
    assert scratch.acquire() == first
    scratch.release()
    tracker.flush()
    assert tracker.total == 3 * 4096
    scratch.release()
    tracker.flush()
    assert tracker.total == 0
    assert len(scratch.acquire()) == 3
    scratch.release()
    tracker.close()


class NoBarrier(HostDevice):
    def barrier(self) -> PassedAll:
        raise DeviceError("a barrier", device="host", code="BROKEN")


def test_freeing_does_not_wait_for_others_work() -> None:
    tracker = VramTracker(NoBarrier())
    scratch = Scratch(tracker, 4096, 3)
    for _ in range(2):
        scratch.acquire()
    for _ in range(2):
        scratch.release(unused=True)
    tracker.flush()
    assert tracker.total == 0
    tracker.close()


def test_unless_one_of_its_users_has_not_seen_his_own_end() -> None:
    device = NoBarrier()
    tracker = VramTracker(device)
    scratch = Scratch(tracker, 4096, 3)
    for _ in range(2):
        scratch.acquire()
    scratch.release()
    scratch.release(unused=True)
    with pytest.raises(DeviceError, match="a barrier"):
        tracker.flush()
    assert tracker.total == 3 * 4096


def test_too_little_memory_leaves_none_of_it_taken() -> None:
    device = HostDevice(total_bytes=3 * 4096)
    tracker = VramTracker(device)
    scratch = Scratch(tracker, 4096, 4)
    for _ in range(2):
        with pytest.raises(OutOfDeviceMemoryError) as caught:
            scratch.acquire()
        assert caught.value.breakdown == {}  # it is one allocation
        del caught
        tracker.flush()
        assert tracker.total == 0
    assert len(Scratch(tracker, 4096, 3).acquire()) == 3
    tracker.close()
