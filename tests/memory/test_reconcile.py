"""The ledger held against the driver: where its memory lies, and how much the driver says there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError

import pytest

from asyncload.device import DeviceMemory, HostDevice, MemoryInfo, Residency
from asyncload.errors import DeviceError, ResidencyError
from asyncload.memory import Purpose, Reconciliation, VramTracker
from asyncload.memory._reconcile import CONTEXT_GROWTH
from asyncload.plan import ALLOCATION_BLOCK

MIB = 1 << 20
GIB = 1 << 30
FAR = 1 << 50


class DrivenDevice(HostDevice):
    """A device whose driver tells of foreign memory, of the process's own, and of where given memory lies."""

    def __init__(self) -> None:
        super().__init__(total_bytes=8 * GIB)
        self.foreign = 0
        self.process: int | None = None
        self.lies: dict[int, Residency] = {}
        self.when_asked: Callable[[], object] = lambda: None

    def memory(self) -> MemoryInfo:
        memory = super().memory()
        return MemoryInfo(memory.free - self.foreign, memory.total)

    def process_memory(self) -> int | None:
        return self.process

    def residency(self, memory: DeviceMemory) -> Residency:
        found = self.lies.get(memory.address) or super().residency(memory)
        self.when_asked()
        return found


@pytest.fixture
def device() -> Iterator[DrivenDevice]:
    device = DrivenDevice()
    yield device
    device.close()


@pytest.fixture
def tracker(device: DrivenDevice) -> Iterator[VramTracker]:
    tracker = VramTracker(device)
    yield tracker
    tracker.close()


# How much


def test_the_ledger_and_the_device_agree(device: DrivenDevice) -> None:
    device.foreign = 3 * GIB  # what was there before is no change
    tracker = VramTracker(device)
    assert tracker.reconcile() == Reconciliation(
        ledger_change=0, driver_change=0, tolerance=CONTEXT_GROWTH, source="device"
    )
    held = [tracker.allocate(nbytes, Purpose.WEIGHTS, "a tensor") for nbytes in (1, 2 * MIB, 3 * MIB)]
    found = tracker.reconcile()
    assert (found.ledger_change, found.driver_change, found.difference) == (5 * MIB + 1, 5 * MIB + 1, 0)
    assert found.tolerance == 64 * MIB + (2 * MIB - 1) + 0 + 1 * MIB
    assert found.within
    held.clear()
    tracker.flush()
    assert tracker.reconcile() == Reconciliation(
        ledger_change=0, driver_change=0, tolerance=CONTEXT_GROWTH, source="device"
    )


def test_what_went_past_the_ledger_shows(tracker: VramTracker, device: DrivenDevice) -> None:
    held = tracker.allocate(10 * MIB, Purpose.WEIGHTS, "a tensor")
    device.foreign = GIB
    found = tracker.reconcile()
    assert (found.ledger_change, found.driver_change, found.difference) == (held.nbytes, held.nbytes + GIB, GIB)
    assert not found.within
    with tracker.register(FAR, GIB, Purpose.KV_CACHE, "the cache"):
        found = tracker.reconcile()
        assert (found.ledger_change, found.difference, found.within) == (10 * MIB + GIB, 0, True)
    assert not tracker.reconcile().within


@pytest.mark.parametrize("sign", [1, -1])
def test_the_tolerance_is_the_last_difference_within(device: DrivenDevice, sign: int) -> None:
    device.foreign = GIB
    tracker = VramTracker(device)
    device.foreign = GIB + sign * CONTEXT_GROWTH
    assert (tracker.reconcile().difference, tracker.reconcile().within) == (sign * CONTEXT_GROWTH, True)
    device.foreign += sign
    assert (tracker.reconcile().difference, tracker.reconcile().within) == (sign * (CONTEXT_GROWTH + 1), False)


def test_memory_counts_until_it_is_freed(tracker: VramTracker, device: DrivenDevice) -> None:
    with device.hold():
        tracker.allocate(GIB, Purpose.WEIGHTS, "dropped, and still used").close()
        assert (tracker.reconcile().ledger_change, tracker.reconcile().difference) == (GIB, 0)
    tracker.flush()
    assert (tracker.reconcile().ledger_change, tracker.reconcile().difference) == (0, 0)


def test_where_the_driver_tells_of_this_process_others_do_not_count(device: DrivenDevice) -> None:
    device.process = 500 * MIB  # a context
    tracker = VramTracker(device)
    tracker.register(FAR, 100 * MIB, Purpose.KV_CACHE, "the cache")
    device.process, device.foreign = 602 * MIB, 4 * GIB
    found = tracker.reconcile()
    assert (found.source, found.driver_change, found.difference, found.within) == ("process", 102 * MIB, 2 * MIB, True)
    device.process = 900 * MIB
    assert (tracker.reconcile().difference, tracker.reconcile().within) == (300 * MIB, False)


@pytest.mark.parametrize(("first", "then"), [(None, 900 * MIB), (900 * MIB, None), (None, None)])
def test_both_ends_of_a_change_are_of_one_source(device: DrivenDevice, first: int | None, then: int | None) -> None:
    device.process = first
    tracker = VramTracker(device)
    device.process, device.foreign = then, GIB
    assert (tracker.reconcile().source, tracker.reconcile().driver_change) == ("device", GIB)


def test_a_reconciliation_does_not_change(tracker: VramTracker) -> None:
    with pytest.raises(FrozenInstanceError):
        tracker.reconcile().ledger_change = 1  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    assert ALLOCATION_BLOCK == 2 * MIB


# Where


def test_allocated_memory_is_the_devices(tracker: VramTracker, device: DrivenDevice) -> None:
    tracker.verify_residency()
    held = [tracker.allocate(nbytes, Purpose.WEIGHTS, "a tensor") for nbytes in (0, 1, MIB)]
    theirs = device.allocate(MIB)
    with tracker.register(theirs.address + 4096, 4096, Purpose.KV_CACHE, "the middle of somebody's block"):
        tracker.verify_residency()
    assert len(held) == 3
    device.free(theirs)


def test_what_is_not_the_devices_is_named(tracker: VramTracker, device: DrivenDevice) -> None:
    held = [tracker.allocate(4096, Purpose.WEIGHTS, f"blk.{number}") for number in range(4)]
    device.lies = {held[1].address: Residency.MANAGED, held[3].address: Residency.ELSEWHERE}
    tracker.register(FAR, 4096, Purpose.KV_CACHE, "the cache")
    with pytest.raises(ResidencyError) as caught:
        tracker.verify_residency()
    assert isinstance(caught.value, DeviceError)
    assert (caught.value.device, caught.value.allocations) == ("host", ("blk.1", "blk.3", "the cache"))
    assert str(caught.value) == (
        "host: memory in the ledger is not this device's: "
        f"'blk.1' (weights, 4096 bytes at {held[1].address:#x}) is managed; "
        f"'blk.3' (weights, 4096 bytes at {held[3].address:#x}) is another device's; "
        f"'the cache' (kv_cache, 4096 bytes at {FAR:#x}) is unknown to the driver"
    )


def test_staging_memory_is_not_the_devices(tracker: VramTracker, device: DrivenDevice) -> None:
    staging = device.staging(4096)
    with tracker.register(staging.address, 4096, Purpose.KV_CACHE, "pinned"), pytest.raises(ResidencyError) as caught:
        tracker.verify_residency()
    assert caught.value.allocations == ("pinned",)
    tracker.verify_residency()
    staging.close()


def test_a_long_list_is_whole_in_the_field_and_short_in_the_message(tracker: VramTracker) -> None:
    for number in range(8):
        tracker.register(FAR + number * 4096, 4096, Purpose.KV_CACHE, f"layer {number}")
    with pytest.raises(ResidencyError, match=r"'layer 4' [^;]*; and 3 more$") as caught:
        tracker.verify_residency()
    assert caught.value.allocations == tuple(f"layer {number}" for number in range(8))


def test_what_is_freed_meanwhile_is_no_stray(tracker: VramTracker, device: DrivenDevice) -> None:
    held = [tracker.allocate(4096, Purpose.WEIGHTS, "a tensor") for _ in range(2)]
    theirs = tracker.register(FAR, 4096, Purpose.KV_CACHE, "a cache")

    def free() -> None:
        held.clear()
        theirs.close()
        tracker.flush()

    device.when_asked = free
    tracker.verify_residency()
    assert tracker.total == 0
