"""What every engine that streams layers does, as tests: an engine's test class inherits from ``LayerConformance``."""

from __future__ import annotations

import asyncio
import random
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from asyncload.errors import OptionsError
from asyncload.gguf import GGMLType
from asyncload.loader import LayerRide, LayerStream, Loader
from asyncload.testing._layer_model import write_layers
from asyncload.testing._layer_rig import LayerConsumer, LayerRig, Wait, differences
from asyncload.threads import run_in_thread

__all__ = ["LayerConformance"]

_PATIENCE = 60.0  # seconds; generous, as it only matters where something hangs
_SLOW = 0.001  # seconds that a copy, or a piece of work, takes longer
# Layers and slots: multiples and others, as many, and fewer.
_CASES = [
    *((1, 1), (5, 1), (4, 2), (5, 2), (6, 3), (7, 3), (8, 4), (7, 4), (5, 5)),
    *((8, 5), (12, 6), (8, 6), (7, 7), (9, 7), (8, 8), (11, 8), (3, 8)),
]
_feeds = pytest.mark.parametrize("host", ["slabs", "file"])


@dataclass(frozen=True, slots=True)
class _Model:
    """A model, and the bytes of its layers' tensors."""

    path: Path
    dtype: str
    content: dict[str, bytes]

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.content.values()))

    def open(self, loader: Loader, **how: Any) -> LayerStream:
        """All layers stream."""
        return loader.stream(self.path, dtype=self.dtype, allow=["stream"], workspace=0, kv_bytes=0, **how)

    async def check(self, consumer: LayerConsumer) -> None:
        """It has read exactly one sweep."""
        wrong = differences(await run_in_thread(consumer.take), self.content)
        assert not wrong, "\n".join(wrong)


async def _model(folder: Path, layers: int, *, uneven: bool = True, decoded: bool = True) -> _Model:
    path, type_, dtype, rows = folder / "model.gguf", GGMLType.Q8_0, "packed", 32
    if decoded:
        type_, dtype, rows = GGMLType.Q4_K, "bf16", 96  # some are decoded in more than one piece
    write = partial(write_layers, path, layers, uneven=uneven, type=type_, dtype=dtype, rows=rows)
    content = await run_in_thread(write)
    return _Model(path, dtype, {name: data for name, data in content.items() if name.startswith("blk.")})


async def _sweep(layers: LayerStream | LayerRide, consumer: LayerConsumer) -> list[int]:
    """The numbers of a sweep's layers in their order; the consumer has work on all of them."""
    numbers: list[int] = []
    async for layer in layers:
        consumer.use(layer)
        numbers.append(layer.number)
    return numbers


class LayerConformance(ABC):
    """Every byte of every sweep, also when rides share it, and after as many ``cancellations`` of each kind.

    A subclass supplies ``rig``. Copies that do not wait for the work on the layer before, and work that does not wait
    for the copies, would show as wrong bytes: a test takes each wait away and finds them.
    """

    cancellations: int = 10

    @abstractmethod
    def rig(self, *, lost: Wait | None = None) -> AbstractAsyncContextManager[LayerRig]:
        """An engine over a device, such as ``host_rig`` and ``cuda_rig`` make, without the ``lost`` wait."""

    def in_use(self, loader: Loader) -> Sequence[object]:
        """What must be after a cancelled stream as before; an engine's class adds what it can tell. Blocks."""
        loader.tracker.flush()
        threads = [thread.name for thread in threading.enumerate()]
        return [
            loader.tracker.by_purpose(),
            sum(name.startswith("asyncload-layers") for name in threads),
            sum(name.startswith("asyncload-host-stream") for name in threads),
        ]

    @pytest.mark.anyio
    @_feeds
    @pytest.mark.parametrize(("uneven", "decoded"), [(False, False), (True, True)], ids=["even", "uneven-decoded"])
    @pytest.mark.parametrize(("layers", "slots"), _CASES)
    async def test_every_byte_of_every_sweep(
        self, tmp_path: Path, host: str, *, layers: int, slots: int, uneven: bool, decoded: bool
    ) -> None:
        model = await _model(tmp_path, layers, uneven=uneven, decoded=decoded)
        async with self.rig() as rig, model.open(rig.loader, slots=slots, host=host) as stream:
            consumer = await rig.consumer(model.nbytes, seed=layers)
            for bus, work in ((_SLOW, 0.0), (0.0, _SLOW), (_SLOW, _SLOW)):
                rig.slow_bus(bus)
                consumer.seconds = work
                assert await _sweep(stream, consumer) == list(range(layers))
                await model.check(consumer)
            used, plan = rig.loader.tracker.by_purpose(), stream.plan.breakdown
            assert {purpose: nbytes for purpose, nbytes in used.items() if nbytes > plan[purpose]} == {}

    @pytest.mark.anyio
    @_feeds
    @pytest.mark.parametrize("slots", [1, 2, 3])
    async def test_every_byte_for_each_of_several_rides(self, tmp_path: Path, host: str, slots: int) -> None:
        model = await _model(tmp_path, 5, decoded=False)
        async with self.rig() as rig, model.open(rig.loader, slots=slots, host=host) as stream:
            rig.slow_bus(_SLOW / 2)

            async def consume(ride: LayerRide, consumer: LayerConsumer) -> None:
                with ride:
                    for _ in range(3):
                        assert await _sweep(ride, consumer) == list(range(5))
                        await model.check(consumer)

            async with anyio.create_task_group() as group:
                consumers = [
                    await rig.consumer(model.nbytes, seconds=seconds, poison=False) for seconds in (0.0, _SLOW, _SLOW)
                ]
                for ride, consumer in [(stream.join(), consumer) for consumer in consumers]:
                    group.start_soon(consume, ride, consumer)

    @pytest.mark.anyio
    @pytest.mark.parametrize(
        ("wait", "host"),
        # what comes from the file has arrived when it is handed out
        [(Wait.COPY_FOR_WORK, "slabs"), (Wait.COPY_FOR_WORK, "file"), (Wait.WORK_FOR_COPY, "slabs")],
    )
    async def test_without_either_wait_bytes_are_wrong(self, tmp_path: Path, host: str, wait: Wait) -> None:
        model = await _model(tmp_path, 6)
        async with self.rig(lost=wait) as rig, model.open(rig.loader, slots=2, host=host) as stream:
            consumer = await rig.consumer(model.nbytes)
            wrong: list[str] = []
            for attempt in range(10):  # the first would do, but that everything else may be slower still
                slow = _SLOW * 2**attempt
                if wait is Wait.WORK_FOR_COPY:
                    rig.slow_bus(slow)
                else:
                    consumer.seconds = slow
                await _sweep(stream, consumer)
                if wrong := differences(await run_in_thread(consumer.take), model.content):
                    break
            assert wrong

    @pytest.mark.anyio
    async def test_work_needs_a_stream(self, tmp_path: Path) -> None:
        model = await _model(tmp_path, 2)
        async with self.rig() as rig, model.open(rig.loader) as stream:
            async for layer in stream:
                with pytest.raises(OptionsError), layer.on():
                    pytest.fail("there is no stream")

    # However a consumer ends

    @pytest.mark.anyio
    @_feeds
    async def test_consumers_cancelled_at_random_moments(self, tmp_path: Path, host: str) -> None:
        rng = random.Random(host)  # noqa: S311 - cases, not secrets
        model = await _model(tmp_path, 6)
        async with self.rig() as rig:
            consumer = await rig.consumer(model.nbytes, seconds=_SLOW)

            async def consume() -> None:
                async for layer in stream:
                    with layer.on(consumer.stream):
                        await _turns(rng.randrange(3))
                        consumer.work(layer)
                        await _turns(rng.randrange(3))

            async with self._the_same_afterwards(rig.loader), model.open(rig.loader, slots=2, host=host) as stream:
                before = rig.loader.tracker.by_purpose()
                seconds = await _time(consume)
                await model.check(consumer)
                for _ in range(self.cancellations):
                    rig.slow_bus(rng.choice([0.0, _SLOW]))
                    await _cancel(consume, seconds, rng)
                    consumer.forget()  # its work may be under way
                    with anyio.fail_after(_PATIENCE):
                        await _sweep(stream, consumer)
                    await model.check(consumer)
                    assert rig.loader.tracker.by_purpose() == before

    @pytest.mark.anyio
    @_feeds
    async def test_streams_cancelled_at_random_moments(self, tmp_path: Path, host: str) -> None:
        rng = random.Random(host)  # noqa: S311
        model = await _model(tmp_path, 6)
        async with self.rig() as rig:
            consumer = await rig.consumer(model.nbytes, seconds=_SLOW)

            async def consume() -> None:
                async with model.open(rig.loader, slots=2, host=host) as stream:
                    await _sweep(stream, consumer)

            seconds = await _time(consume)  # and what is made once is made
            await model.check(consumer)
            async with self._the_same_afterwards(rig.loader):
                for _ in range(self.cancellations):
                    rig.slow_bus(rng.choice([0.0, _SLOW]))
                    async with self._the_same_afterwards(rig.loader):
                        await _cancel(consume, seconds, rng)
                        consumer.forget()
                    with anyio.fail_after(_PATIENCE):
                        await consume()
                    await model.check(consumer)

    @asynccontextmanager
    async def _the_same_afterwards(self, loader: Loader) -> AsyncGenerator[None]:
        before = await run_in_thread(self.in_use, loader)
        yield
        after = await run_in_thread(self.in_use, loader)
        assert after == before, f"{after}, not {before}"
        found = await run_in_thread(loader.tracker.reconcile)
        assert found.within, found


async def _turns(count: int) -> None:
    for _ in range(count):
        await anyio.lowlevel.checkpoint()


async def _time(consume: Callable[[], Coroutine[Any, Any, None]]) -> float:
    """The seconds that a function takes."""
    begin = anyio.current_time()
    await consume()
    return anyio.current_time() - begin


async def _cancel(consume: Callable[[], Coroutine[Any, Any, None]], seconds: float, rng: random.Random) -> None:
    """Runs a function in a task, and cancels that after some turns of the loop, or within some seconds."""

    async def moment() -> None:
        if rng.random() < 0.5:  # noqa: PLR2004 - as often
            await _turns(rng.randrange(80))
        else:
            await anyio.sleep(rng.random() * seconds)

    if _on_asyncio() and rng.random() < 0.5:  # noqa: PLR2004
        task = asyncio.ensure_future(consume())
        await moment()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        return
    async with anyio.create_task_group() as group:
        group.start_soon(consume)
        await moment()
        group.cancel_scope.cancel()


def _on_asyncio() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
