from __future__ import annotations

import asyncio
import os
import threading

import anyio
import anyio.lowlevel
import pytest

from asyncload.threads import LoopHandle, Threads, run_in_thread, settle


@pytest.fixture
def threads() -> object:
    threads = Threads(2, "test")
    yield threads
    threads.close()


@pytest.mark.anyio
async def test_results_and_errors_come_back(threads: Threads) -> None:
    assert await threads.run(lambda: threading.current_thread().name.startswith("test"))
    assert await run_in_thread(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await threads.run(divmod, 1, 0)
    with pytest.raises(ZeroDivisionError):
        await run_in_thread(divmod, 1, 0)


@pytest.mark.anyio
async def test_a_scope_that_is_cancelled_is_left_only_when_the_call_has_ended(threads: Threads) -> None:
    begun, release, ended = threading.Event(), threading.Event(), threading.Event()

    def call() -> None:
        begun.set()
        release.wait(60)
        ended.set()

    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:

            async def cancel() -> None:
                await run_in_thread(begun.wait, 60)
                scope.cancel()
                release.set()

            group.start_soon(cancel)
            await threads.run(call)
            assert ended.is_set()
            await anyio.lowlevel.checkpoint()  # the cancellation comes here
            pytest.fail("the cancellation was lost")
    assert scope.cancelled_caught


@pytest.mark.asyncio
async def test_native_cancellations_again_and_again_do_not_overtake_the_call(threads: Threads) -> None:
    begun, release = threading.Event(), threading.Event()
    ended: list[bool] = []

    def call() -> None:
        begun.set()
        release.wait(60)
        ended.append(True)

    async def wait() -> None:
        try:
            await threads.run(call)
        finally:
            assert ended, "the waiting task went on while its thread still ran"

    task = asyncio.create_task(wait())
    await asyncio.to_thread(begun.wait, 60)
    for _ in range(20):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.anyio
async def test_settle_returns_at_once_when_there_is_nothing_to_wait_for() -> None:
    event = anyio.Event()
    event.set()
    await settle(event)


@pytest.mark.anyio
async def test_a_thread_of_its_own_has_ended_on_return() -> None:
    await run_in_thread(lambda: None)
    assert "asyncload-once" not in [thread.name for thread in threading.enumerate()]  # other tests' threads may end


def test_threads_are_nicer_than_the_process() -> None:
    threads = Threads(1, "nice", nice=7)

    async def main() -> int:
        return await threads.run(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    assert anyio.run(main) == min(os.getpriority(os.PRIO_PROCESS, 0) + 7, 19)
    threads.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("nice")]


@pytest.mark.asyncio
async def test_what_is_posted_to_a_loop_can_start_tasks() -> None:
    """Also where anyio has not started the loop, and no task is the one that asks."""
    async with anyio.create_task_group() as group:
        loop, started = LoopHandle(), anyio.Event()

        async def task() -> None:
            started.set()

        await run_in_thread(lambda: loop.post(lambda: group.start_soon(task)))
        with anyio.fail_after(20):
            await started.wait()
