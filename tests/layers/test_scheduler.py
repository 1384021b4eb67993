"""The scheduler by itself, in virtual time: who is left behind, and when, and who is woken."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from trio.testing import MockClock

from asyncload.errors import ClosedError, CopyError, DeviceError, StalledError
from asyncload.layers import Fed, Ride, Scheduler, Slot, Use

pytestmark = pytest.mark.anyio
LIMIT = 10.0
LAYERS = 4


@pytest.fixture
def anyio_backend() -> Any:
    return "trio", {"clock": MockClock(autojump_threshold=0)}


class FakeEvent:
    """Passes when it is told to, with an error or without."""

    def __init__(self, *, passed: bool = True) -> None:
        self.passed = anyio.Event()
        self.error: Exception | None = None
        if passed:
            self.passed.set()

    async def wait(self) -> None:
        """Until it passes."""
        await self.passed.wait()
        if self.error is not None:
            raise self.error


def tensors_of(number: int) -> Any:
    """Two of a layer's."""
    infos = [SimpleNamespace(name=f"blk.{number}.{name}", offset=100 * number + 32) for name in ("first", "second")]
    return SimpleNamespace(tensors=[SimpleNamespace(info=info) for info in infos])


class Bench:
    """A scheduler over no device, whose feeds take ``feeding`` seconds a layer."""

    def __init__(self, slots: int) -> None:
        self.feeding = dict.fromkeys(range(LAYERS), 0.0)
        self.arrivals: dict[int, FakeEvent] = {}  # those that are to be told
        self.recording: Exception | None = None
        layers: Any = [SimpleNamespace(number=number, load=tensors_of(number)) for number in range(LAYERS)]
        no_memory: Any = SimpleNamespace(memory=None)
        spaces = [Slot(index, no_memory) for index in range(slots)]
        self.scheduler = Scheduler(layers, spaces, self._feed, self._record, at_once=2, stall_limit=LIMIT)

    async def _feed(self, layer: Any, _slot: Any) -> Fed:
        await anyio.sleep(self.feeding[layer.number])
        arrived: Any = self.arrivals.pop(layer.number, FakeEvent())
        return Fed([arrived], arrival=arrived.wait)

    async def _record(self, _stream: Any) -> Any:
        if self.recording is not None:
            raise self.recording
        return FakeEvent()

    async def take(self, ride: Ride) -> int | None:
        """A layer's number, after it has been used; None at the end of the sweep."""
        use = await self.scheduler.step(ride)
        if use is None:
            return None
        self.enter(ride, use)
        self.finish(ride, use)
        return use.layer.number

    async def sweep(self, ride: Ride) -> list[int | None]:
        return [await self.take(ride) for _ in range(LAYERS + 1)]

    def enter(self, ride: Ride, use: Use) -> None:
        stream: Any = "a stream"
        self.scheduler.enter(ride, use, stream)

    def finish(self, ride: Ride, use: Use) -> None:
        ended: Any = FakeEvent()
        self.scheduler.finish(ride, use, ended)


WHOLE = [*range(LAYERS), None]


@asynccontextmanager
async def running(slots: int = 2) -> AsyncGenerator[Bench]:
    bench = Bench(slots)
    with anyio.fail_after(1000 * LIMIT):  # where all wait for each other
        async with anyio.create_task_group() as group:
            group.start_soon(bench.scheduler.run)
            yield bench
            await bench.scheduler.close()
            group.cancel_scope.cancel()


# Who keeps others waiting


@pytest.mark.parametrize("where", ["between", "with a layer", "inside"])
@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8])
async def test_a_ride_that_idles_alone_is_left_behind_for_those_that_wait(slots: int, where: str) -> None:
    async with running(slots) as bench:
        idle = bench.scheduler.join()
        assert await bench.take(idle) == 0
        if where != "between":
            use = await bench.scheduler.step(idle)
            assert use is not None
            if where == "inside":
                bench.enter(idle, use)
        await anyio.sleep(5 * LIMIT)
        later, begin = bench.scheduler.join(), anyio.current_time()
        for _ in range(3):
            assert await bench.sweep(later) == WHOLE
        assert anyio.current_time() - begin == LIMIT
        with pytest.raises(StalledError):
            await bench.scheduler.step(idle)


async def test_a_ride_that_idles_in_nobodys_way_keeps_its_place() -> None:
    async with running() as bench:
        idle = bench.scheduler.join()
        assert await bench.take(idle) == 0
        bench.scheduler.join()  # and does not ask for a layer
        await anyio.sleep(100 * LIMIT)
        assert [await bench.take(idle) for _ in range(LAYERS)] == WHOLE[1:]


async def test_a_ride_that_is_slow_and_goes_on_keeps_its_place() -> None:
    async with running() as bench:
        slow = bench.scheduler.join()
        assert await bench.take(slow) == 0
        numbers: list[int | None] = []

        async def wait() -> None:
            numbers.extend(await bench.sweep(later))

        async with anyio.create_task_group() as group:
            later = bench.scheduler.join()
            group.start_soon(wait)
            for number in WHOLE[1:]:
                await anyio.sleep(0.9 * LIMIT)
                assert await bench.take(slow) == number
            bench.scheduler.leave(slow)
        assert numbers == WHOLE


async def test_who_has_stopped_waiting_has_nobody_left_behind() -> None:
    async with running() as bench:
        idle = bench.scheduler.join()
        assert await bench.take(idle) == 0
        later = bench.scheduler.join()
        with anyio.move_on_after(0.9 * LIMIT):
            await bench.take(later)
        await anyio.sleep(5 * LIMIT)
        assert idle.error is None
        begin = anyio.current_time()
        assert await bench.take(later) == 0
        assert anyio.current_time() - begin == LIMIT
        assert isinstance(idle.error, StalledError)


async def test_a_layer_that_is_long_on_its_way_is_nobodys_fault() -> None:
    async with running(slots=2) as bench:
        bench.feeding[1] = 5 * LIMIT
        first, second = bench.scheduler.join(), bench.scheduler.join()
        use = await bench.scheduler.step(second)
        assert use is not None
        bench.enter(second, use)
        assert await bench.take(first) == 0
        assert await bench.take(first) == 1
        assert anyio.current_time() > 4 * LIMIT
        bench.finish(second, use)
        assert await bench.take(second) == 1


async def test_a_ride_that_waits_for_what_it_keeps_itself_is_told() -> None:
    async with running(slots=1) as bench:
        ride = bench.scheduler.join()
        use = await bench.scheduler.step(ride)
        assert use is not None
        bench.enter(ride, use)
        with pytest.raises(StalledError, match="layer 0 was kept for 10 seconds"):
            await bench.scheduler.step(ride)
        bench.finish(ride, use)
        assert await bench.sweep(bench.scheduler.join()) == WHOLE


async def test_work_that_cannot_be_waited_for_keeps_its_layer_until_its_block_ends() -> None:
    async with running(slots=1) as bench:
        bench.recording = DeviceError("the stream is gone", device="none")
        slow, first = bench.scheduler.join(), bench.scheduler.join()
        use = await bench.scheduler.step(slow)
        assert use is not None
        bench.enter(slow, use)
        assert await bench.take(first) == 0
        with anyio.move_on_after(3 * LIMIT) as scope:
            await bench.take(first)
        assert scope.cancelled_caught
        assert isinstance(slow.error, StalledError)
        bench.finish(slow, use)
        assert await bench.take(first) == 1


async def test_who_leaves_is_woken() -> None:
    async with running(slots=1) as bench:
        keeper, ride = bench.scheduler.join(), bench.scheduler.join()
        assert await bench.take(ride) == 0

        async def wait() -> None:
            with pytest.raises(ClosedError):
                await bench.take(ride)

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            bench.scheduler.leave(ride)
        assert await bench.sweep(keeper) == WHOLE


# Copies that fail


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("failing", range(LAYERS))
async def test_a_copy_that_fails_reaches_all_rides_at_their_next_step(failing: int, count: int) -> None:
    async with running(slots=2) as bench:
        rides = [bench.scheduler.join() for _ in range(count)]
        arrival = bench.arrivals[failing] = FakeEvent(passed=False)
        for number in range(failing + 1):
            for ride in rides:
                assert await bench.take(ride) == number
        arrival.error = CopyError("broken", device="none")
        arrival.passed.set()
        await anyio.wait_all_tasks_blocked()
        for ride in rides:
            with pytest.raises(CopyError) as caught:
                await bench.scheduler.step(ride)
            said = caught.value.layer, caught.value.tensor, caught.value.offset
            assert said == (failing, f"blk.{failing}.first", 100 * failing + 32)
        for _ in range(2):
            for number in WHOLE:
                for ride in rides:
                    assert await bench.take(ride) == number


@pytest.mark.parametrize("slots", [1, 2])
async def test_a_layer_is_handed_out_once_the_one_before_in_its_slot_has_arrived(slots: int) -> None:
    async with running(slots) as bench:
        arrival = bench.arrivals[0] = FakeEvent(passed=False)
        ride = bench.scheduler.join()
        for number in range(slots):
            assert await bench.take(ride) == number
        with anyio.move_on_after(LIMIT / 2) as scope:
            await bench.take(ride)
        assert scope.cancelled_caught
        arrival.passed.set()
        assert [await bench.take(ride) for _ in range(slots, LAYERS + 1)] == WHOLE[slots:]


async def test_a_sweep_ends_when_its_copies_have() -> None:
    async with running(slots=LAYERS) as bench:
        ride = bench.scheduler.join()
        arrival = bench.arrivals[LAYERS - 1] = FakeEvent(passed=False)
        for number in range(LAYERS):
            assert await bench.take(ride) == number
        with anyio.move_on_after(LIMIT) as scope:
            await bench.take(ride)
        assert scope.cancelled_caught
        arrival.passed.set()
        assert await bench.take(ride) is None
        await checkpoint()
        assert bench.scheduler.last is not None


# The end


async def test_closing_waits_for_blocks_within_the_limit() -> None:
    async with running() as bench:
        ride = bench.scheduler.join()
        use = await bench.scheduler.step(ride)
        assert use is not None
        bench.enter(ride, use)

        async def work(seconds: float) -> None:
            await anyio.sleep(seconds)
            bench.finish(ride, use)

        async with anyio.create_task_group() as group:
            group.start_soon(work, LIMIT / 2)
            await bench.scheduler.close()
            assert anyio.current_time() == LIMIT / 2


async def test_closing_does_not_wait_for_ever() -> None:
    async with running() as bench:
        ride = bench.scheduler.join()
        use = await bench.scheduler.step(ride)
        assert use is not None
        bench.enter(ride, use)
        await bench.scheduler.close()
        assert anyio.current_time() == LIMIT
        bench.finish(ride, use)
