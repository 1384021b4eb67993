from __future__ import annotations

from collections.abc import Iterator

import anyio
import anyio.lowlevel
import pytest

from asyncload.device import HostDevice
from asyncload.memory import StagingBuffer, StagingPool, StagingShare
from asyncload.threads import run_in_thread

CHUNK = 64 << 10


@pytest.fixture
def pool() -> Iterator[StagingPool]:
    device = HostDevice()
    pool = StagingPool(device, CHUNK, 3)
    yield pool
    assert pool.free == 3
    pool.close()
    device.close()


async def wait_until_blocked() -> None:
    for _ in range(5):
        await anyio.lowlevel.checkpoint()


@pytest.mark.anyio
async def test_buffers_are_distinct_and_bounded(pool: StagingPool) -> None:
    share = pool.share()
    buffers = [await share.acquire() for _ in range(3)]
    for number, buffer in enumerate(buffers):
        buffer.view[:] = bytes([number]) * CHUNK
    assert [set(buffer.view) for buffer in buffers] == [{0}, {1}, {2}]
    assert pool.free == 0
    with anyio.move_on_after(0.01) as scope:
        await share.acquire()
    assert scope.cancelled_caught
    for buffer in buffers:
        buffer.release()
        buffer.release()  # the second time does nothing
    assert (pool.free, share.held) == (3, 0)


@pytest.mark.anyio
async def test_a_freed_buffer_goes_to_the_load_that_holds_the_fewest(pool: StagingPool) -> None:
    large, small = pool.share(), pool.share()
    held = [await large.acquire() for _ in range(3)]
    order: list[str] = []
    got: list[StagingBuffer] = []

    async def want(share: StagingShare, name: str) -> None:
        got.append(await share.acquire())
        order.append(name)

    async with anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(want, large, "large")
        await wait_until_blocked()
        group.start_soon(want, small, "small")
        await wait_until_blocked()
        for buffer in held:
            await run_in_thread(buffer.release)  # as an event's thread does
            await wait_until_blocked()
    assert order[0] == "small"
    assert order.count("large") == 2
    for buffer in got:
        buffer.release()


@pytest.mark.anyio
async def test_a_waiter_that_is_cancelled_loses_nothing(pool: StagingPool) -> None:
    share = pool.share()
    held = [await share.acquire() for _ in range(3)]

    async def borrow() -> None:
        (await share.acquire()).release()

    for _ in range(20):
        async with anyio.create_task_group() as group:
            group.start_soon(borrow)
            await wait_until_blocked()
            group.cancel_scope.cancel()
            held.pop().release()  # at the same moment
        assert pool.free == 1
        held.append(await share.acquire())
    for buffer in held:
        buffer.release()
