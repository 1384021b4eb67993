"""A stream of layers: what it gives, to whom, and that it ends well however it ends."""

from __future__ import annotations

import ctypes
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from asyncload.device import HostDevice
from asyncload.errors import (
    ClosedError,
    CopyError,
    DeviceError,
    DoesNotFitError,
    OutOfDeviceMemoryError,
    PlanError,
    SourceReadError,
    StalledError,
    TensorNotFoundError,
)
from asyncload.gguf import GGMLType
from asyncload.layers import Fed, Layer, Slot
from asyncload.loader import LayerRide, LayerStream, Loader
from asyncload.memory import Allocation, Purpose
from asyncload.model import Tensor
from asyncload.options import Options
from asyncload.plan import LayerPlan
from asyncload.source import open_source
from asyncload.testing import FaultySource, random_blocks, write_gguf
from asyncload.threads import run_in_thread
from tests.layers.models import Content, finish, layers_only, open_stream, sweep, take

pytestmark = pytest.mark.anyio
Six = tuple[Path, Content]
ORDER = list(range(6))
PATIENCE = 20.0  # seconds; it matters only where something hangs
feeds = pytest.mark.parametrize("host", ["slabs", "file"])


async def use_on(layer: Layer, stream: Any) -> None:
    with layer.on(stream):
        pass


async def give_turns(count: int) -> None:
    for _ in range(count):
        await anyio.lowlevel.checkpoint()


def watch_feeding(layers: LayerStream) -> list[int]:
    """The numbers of the layers that are fetched from now on."""
    scheduler, numbers = layers._active().scheduler, list[int]()
    feed: Callable[[LayerPlan, Slot], Awaitable[Fed]] = scheduler._feed

    async def watched(layer: LayerPlan, slot: Slot) -> Fed:
        numbers.append(layer.number)
        return await feed(layer, slot)

    scheduler._feed = watched
    return numbers


# What it gives


@pytest.mark.parametrize(
    ("mode", "room", "streamed"), [("full", 0, 0), ("hybrid", 0, 1), ("hybrid", 1, 4), ("stream", 0, 6)]
)
@feeds
async def test_every_mode_gives_what_a_load_gives(
    six_layers: Six, nothing_left: Any, small: Options, *, mode: str, room: int, streamed: int, host: str
) -> None:
    path, expected = six_layers
    free: int | None = None
    async with Loader(HostDevice(poison=True), options=small) as loader, nothing_left(loader):
        if room:  # for two layers beside the slots
            async with open_stream(loader, path) as layers:
                largest = sorted((layer.nbytes for layer in layers.plan.layers.values()), reverse=True)
                free = layers.plan.total + sum(largest[:2])
        async with open_stream(loader, path, allow=[mode], free=free, margin=0, host=host) as layers:
            assert layers.plan.mode == mode
            assert len(layers.plan.streamed) <= streamed
            assert bool(layers.plan.streamed) == bool(streamed)
            assert loader.tracker.total <= layers.plan.total
            assert list(layers.header.layers) == ORDER
            assert layers.resident["token_embd.weight"].numpy().tobytes() == expected["token_embd.weight"]
            for _ in range(3):
                assert await sweep(layers) == (ORDER, layers_only(expected))
            async for layer in layers:
                assert layer.resident == (layer.number in layers.plan.resident)


@pytest.mark.parametrize("dtype", ["packed", "f32", "bf16"])
@feeds
async def test_tensors_are_those_of_a_load(
    six_layers: Six, nothing_left: Any, dtype: str, host: str, small: Options
) -> None:
    def described(tensor: Tensor) -> tuple[Any, ...]:
        array = tensor.numpy().tobytes()
        return tensor.shape, tensor.logical_shape, tensor.dtype, tensor.type, tensor.device, tensor.nbytes, array

    async with Loader(HostDevice(poison=True), options=small) as loader, nothing_left(loader):
        model = await loader.load(six_layers[0], dtype=dtype)
        async with open_stream(loader, six_layers[0], dtype=dtype, host=host) as layers:
            async for layer in layers:
                with layer.on():
                    assert len(layer) == len(list(layer)) == 2
                    for name, tensor in layer.items():
                        assert described(tensor) == described(model[f"blk.{layer.number}.{name}"])
        model.close()
        await run_in_thread(loader.tracker.flush)


@pytest.mark.parametrize("allow", [["full"], ["stream"]])
async def test_a_layer_is_used_once_and_inside_of_its_block(six_layers: Six, allow: list[str], small: Options) -> None:
    async with Loader("host", options=small) as loader, open_stream(loader, six_layers[0], allow=allow) as layers:
        async for layer in layers:
            with pytest.raises(ClosedError):
                layer["attn_q.weight"]
            with layer.on() as same:
                assert same is layer
                tensor = layer["attn_q.weight"]
                with pytest.raises(TensorNotFoundError):
                    layer["blk.0.attn_q.weight"]
                with pytest.raises(ClosedError), layer.on():
                    pytest.fail("it was entered twice")
                assert tensor.numpy().size
            for use in (lambda layer=layer: layer["attn_q.weight"], lambda layer=layer: len(layer), tensor.numpy):
                with pytest.raises(ClosedError):
                    use()
            with pytest.raises(ClosedError), layer.on():
                pytest.fail("it was entered again")


async def test_what_is_no_stream_of_the_device_is_refused_and_the_layer_stays(six_layers: Six, small: Options) -> None:
    async with Loader("host", options=small) as loader, open_stream(loader, six_layers[0]) as layers:
        found: Content = {}
        async for layer in layers:
            with pytest.raises(DeviceError), layer.on(7):
                pytest.fail("a number was a stream")
            found |= take(layer)
        assert found == layers_only(six_layers[1])


@pytest.mark.parametrize("slots", [1, 2])
@feeds
async def test_layers_that_are_not_entered_are_given_back_at_the_next_step(
    six_layers: Six, slots: int, host: str, small: Options
) -> None:
    async with (
        Loader(HostDevice(poison=True), options=small) as loader,
        open_stream(loader, six_layers[0], slots=slots, host=host) as layers,
    ):
        with anyio.fail_after(PATIENCE):
            found: Content = {}
            last: Layer | None = None
            async for layer in layers:
                if last is not None:
                    with pytest.raises(ClosedError), last.on():
                        pytest.fail("a layer that had passed was entered")
                if layer.number % 3 == 0:
                    found |= take(layer)
                elif layer.number % 3 == 1:
                    layer.skip()
                    layer.skip()
                last = layer
            wanted = ("blk.0.", "blk.3.")
            assert found == {name: data for name, data in six_layers[1].items() if name.startswith(wanted)}
            assert await sweep(layers) == (ORDER, layers_only(six_layers[1]))


@feeds
async def test_a_sweep_left_early_is_not_fetched_to_its_end_and_the_next_is_whole(
    six_layers: Six, host: str, small: Options
) -> None:
    async with (
        Loader(HostDevice(poison=True), options=small) as loader,
        open_stream(loader, six_layers[0], host=host) as layers,
    ):
        fed = watch_feeding(layers)
        with anyio.fail_after(PATIENCE):
            for last in (0, 1, 3, 0):
                async for layer in layers:
                    take(layer)
                    if layer.number == last:
                        break
            assert await sweep(layers) == (ORDER, layers_only(six_layers[1]))
        assert fed.count(5) == 1
        assert fed.count(4) <= 2  # of the sweep that was left at layer 3, too


async def test_the_next_sweep_is_fetched_before_anybody_asks(six_layers: Six, small: Options) -> None:
    async with Loader("host", options=small) as loader, open_stream(loader, six_layers[0], slots=3) as layers:
        fed = watch_feeding(layers)
        with anyio.fail_after(PATIENCE):
            await sweep(layers)
            while fed.count(2) < 2:
                await anyio.sleep(0.001)
        assert 3 not in fed[ORDER[-1] :]


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
async def test_a_layer_is_handed_out_when_the_work_on_the_one_before_in_its_slot_has_ended(
    six_layers: Six, slots: int, small: Options
) -> None:
    device = HostDevice(poison=True)
    async with Loader(device, options=small) as loader, open_stream(loader, six_layers[0], slots=slots) as layers:
        stream, ride = device.stream(), layers.join()
        with stream.hold(), anyio.fail_after(PATIENCE):
            for number in range(slots):
                layer = await anext(ride)
                assert layer.number == number
                await use_on(layer, stream)
            with anyio.move_on_after(0.05) as scope:
                await anext(ride)
            assert scope.cancelled_caught
        assert (await anext(ride)).number == slots
        await run_in_thread(stream.close)


async def test_leaving_sweeps_early_does_not_let_the_host_run_ahead(six_layers: Six, small: Options) -> None:
    device = HostDevice(poison=True)
    async with Loader(device, options=small) as loader, open_stream(loader, six_layers[0], slots=2) as layers:
        stream, used = device.stream(), 0
        with stream.hold(), anyio.move_on_after(0.3):
            while True:
                async for layer in layers:
                    await use_on(layer, stream)
                    used += 1
                    break
        assert used <= 2
        with anyio.fail_after(PATIENCE):
            assert await sweep(layers) == (ORDER, layers_only(six_layers[1]))
        await run_in_thread(stream.close)


# Several rides


@pytest.mark.parametrize("count", [2, 3])
@feeds
async def test_rides_share_a_sweep_and_each_gets_every_layer_once_in_order(
    six_layers: Six, nothing_left: Any, count: int, host: str, small: Options
) -> None:
    device = HostDevice(poison=True, bandwidth=500e6)
    async with (
        Loader(device, options=small) as loader,
        nothing_left(loader),
        open_stream(loader, six_layers[0], host=host) as layers,
    ):
        fed = watch_feeding(layers)
        found: list[list[tuple[list[int], Content]]] = [[] for _ in range(count)]

        async def consume(ride: LayerRide, number: int) -> None:
            with ride:
                for _ in range(3):
                    numbers: list[int] = []
                    content: Content = {}
                    async for layer in ride:
                        numbers.append(layer.number)
                        with layer.on():
                            await give_turns(7 * number)
                            content |= {tensor.name: tensor.numpy().tobytes() for tensor in layer.values()}
                    found[number].append((numbers, content))

        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as group:
                for number, ride in enumerate([layers.join() for _ in range(count)]):
                    group.start_soon(consume, ride, number)
        assert found == [[(ORDER, layers_only(six_layers[1]))] * 3] * count
        assert fed.count(5) == 3


@pytest.mark.parametrize("ahead", [False, True])
async def test_a_ride_that_leaves_is_not_waited_for(six_layers: Six, small: Options, *, ahead: bool) -> None:
    options = replace(small, stall_limit=10 * PATIENCE)
    async with Loader("host", options=options) as loader, open_stream(loader, six_layers[0], slots=8) as layers:
        first, second = layers.join(), layers.join()
        with anyio.fail_after(PATIENCE):
            take(await anext(first))
            with second:
                take(await anext(second))
                kept = await anext(second)
                if ahead:  # the first has begun the next sweep when the second one leaves
                    async for layer in first:
                        take(layer)
                    take(await anext(first))
            for _ in range(4):
                async for layer in first:
                    take(layer)
            with pytest.raises(ClosedError), kept.on():
                pytest.fail("its ride had left")
            with pytest.raises(ClosedError):
                await anext(second)


async def test_a_ride_that_is_dropped_is_not_waited_for(six_layers: Six, small: Options) -> None:
    options = replace(small, stall_limit=10 * PATIENCE)
    async with Loader("host", options=options) as loader, open_stream(loader, six_layers[0]) as layers:
        first, second = layers.join(), layers.join()
        take(await anext(second))
        del second
        with anyio.fail_after(PATIENCE):
            for _ in range(3):
                assert await sweep(first) == (ORDER, layers_only(six_layers[1]))


@pytest.mark.parametrize("where", ["never begun", "handed out", "inside, on a stream"])
async def test_a_ride_that_stalls_is_left_behind(six_layers: Six, where: str, small: Options) -> None:
    device = HostDevice(poison=True)
    async with (
        Loader(device, options=replace(small, stall_limit=0.05)) as loader,
        open_stream(loader, six_layers[0]) as layers,
    ):
        first, slow, stream = layers.join(), layers.join(), device.stream()
        swept = anyio.Event()

        async def stall() -> None:
            if where == "handed out":
                layer = await anext(slow)
                await swept.wait()
                with pytest.raises(StalledError), layer.on(stream):
                    pytest.fail("it had lost its place")
            elif where == "inside, on a stream":
                layer = await anext(slow)
                with layer.on(stream):
                    await swept.wait()
            await swept.wait()
            with pytest.raises(StalledError):
                await anext(slow)
            with pytest.raises(TimeoutError):
                await anext(slow)

        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as group:
                group.start_soon(stall)
                for _ in range(2):
                    assert await sweep(first) == (ORDER, layers_only(six_layers[1]))
                swept.set()
        await run_in_thread(stream.close)


async def test_work_on_the_host_keeps_its_layer_and_then_loses_its_place(six_layers: Six, small: Options) -> None:
    async with (
        Loader(HostDevice(poison=True), options=replace(small, stall_limit=0.05)) as loader,
        open_stream(loader, six_layers[0], slots=1) as layers,
    ):
        first, slow = layers.join(), layers.join()
        with anyio.fail_after(PATIENCE):
            layer = await anext(slow)
            with layer.on():
                take(await anext(first))
                given: list[Layer] = []

                async def step() -> None:
                    given.append(await anext(first))

                async with anyio.create_task_group() as group:
                    group.start_soon(step)
                    while slow._ride.error is None:
                        await anyio.sleep(0.001)
                    await give_turns(20)
                    group.cancel_scope.cancel()
                assert given == []
                found = {tensor.name: tensor.numpy().tobytes() for tensor in layer.values()}
            assert found == {name: data for name, data in six_layers[1].items() if name.startswith("blk.0.")}
            with pytest.raises(StalledError):
                await anext(slow)
            assert (await sweep(first))[0] == ORDER[1:]


# Ends


async def test_a_consumer_that_dies_inside_the_block_leaves_the_slot_safe(six_layers: Six, small: Options) -> None:
    device = HostDevice(poison=True)
    async with Loader(device, options=small) as loader, open_stream(loader, six_layers[0], slots=2) as layers:
        layers._active().wait_for_arrival = False
        stream, seen = device.stream(), list[bytes]()

        class Dies(Exception):  # noqa: N818
            pass

        def read(address: int, nbytes: int) -> None:
            seen.append(ctypes.string_at(address, nbytes))

        async def die(held: Any) -> None:
            async for layer in layers:
                with layer.on(stream):
                    tensor = layer["attn_q.weight"]
                    address, nbytes = tensor.address, tensor.nbytes
                    stream.call(held.wait)
                    stream.call(partial(read, address, nbytes))
                    raise Dies

        with stream.hold() as held, anyio.fail_after(PATIENCE):
            with pytest.raises(Dies):
                await die(held)
            taken = 0
            with anyio.move_on_after(0.1):  # what comes into the other slot may be had
                async for layer in layers:
                    with layer.on(stream):
                        taken += 1
        layers._active().wait_for_arrival = True
        with anyio.fail_after(PATIENCE):
            assert await sweep(layers) == (ORDER, layers_only(six_layers[1]))
            await run_in_thread(finish, device, stream)
        assert taken <= 2
        assert seen == [six_layers[1]["blk.0.attn_q.weight"]]
        await run_in_thread(stream.close)


@feeds
async def test_a_cancelled_step_loses_no_layer(six_layers: Six, host: str, small: Options) -> None:
    rng = random.Random(3)
    device = HostDevice(poison=True, latency=0.002)
    async with Loader(device, options=small) as loader, open_stream(loader, six_layers[0], host=host) as layers:
        ride = layers.join()

        async def step(found: list[Layer]) -> None:
            found.append(await anext(ride))

        with anyio.fail_after(PATIENCE):
            for number in 3 * [*ORDER, None]:
                found: list[Layer] = []
                if number is None:
                    with pytest.raises(StopAsyncIteration):
                        await ride.__anext__()
                    continue
                while not found:
                    async with anyio.create_task_group() as group:
                        group.start_soon(step, found)
                        await give_turns(rng.randrange(8))
                        group.cancel_scope.cancel()
                    if rng.random() < 0.2:
                        await anyio.sleep(0.001)
                assert found[0].number == number
                assert take(found[0]).items() <= six_layers[1].items()


@pytest.mark.parametrize("rides", [1, 2])
async def test_an_error_of_the_source_reaches_the_rides_and_the_next_sweep_is_whole(
    six_layers: Six, nothing_left: Any, rides: int, small: Options
) -> None:
    faults: dict[int, Callable[[], Exception]] = {}
    source = FaultySource(open_source(six_layers[0]), faults)
    async with (
        Loader(HostDevice(poison=True), options=small) as loader,
        nothing_left(loader),
        open_stream(loader, source, host="file") as layers,
    ):

        async def consume(ride: LayerRide) -> None:
            with pytest.raises(SourceReadError, match="broken"):
                async for layer in ride:
                    take(layer)
                    if layer.number == 1 and not faults:
                        with source._lock:  # else a thread could be past this read by then
                            faults[source.reads] = lambda: SourceReadError("broken", url="x")
            for _ in range(2):
                assert await sweep(ride) == (ORDER, layers_only(six_layers[1]))

        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as group:
                for ride in [layers.join() for _ in range(rides)]:
                    group.start_soon(consume, ride)
    source.close()


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("joined", [False, True])
@feeds
async def test_a_copy_that_fails_reaches_the_ride_and_the_next_sweep_is_whole(
    six_layers: Six, nothing_left: Any, host: str, small: Options, *, joined: bool, refused: bool
) -> None:
    device = HostDevice(poison=True)
    async with (
        Loader(device, options=small) as loader,
        nothing_left(loader),
        open_stream(loader, six_layers[0], host=host) as layers,
    ):
        consumer = layers.join() if joined else layers
        with anyio.fail_after(PATIENCE):
            with pytest.raises(CopyError) as caught:
                async for layer in consumer:
                    take(layer)
                    if layer.number == 1:
                        device.fail_upload(1, refused=refused)
            error = caught.value
            assert error.layer is not None
            assert error.layer == layers.header.tensors[error.tensor or ""].layer
            assert error.offset
            for _ in range(2):
                assert await sweep(consumer) == (ORDER, layers_only(six_layers[1]))
        if isinstance(consumer, LayerRide):
            consumer.close()


@pytest.mark.parametrize("allow", [["full"], ["hybrid"], ["stream"]])
async def test_closing_ends_all_rides(six_layers: Six, nothing_left: Any, allow: list[str], small: Options) -> None:
    async with Loader(HostDevice(poison=True), options=small) as loader, nothing_left(loader):
        async with open_stream(loader, six_layers[0], allow=allow) as layers:
            ride, other = layers.join(), layers.join()
            layer = await anext(ride)
        with pytest.raises(ClosedError), layer.on():
            pytest.fail("it was entered after the end")
        for ended in (ride, other):
            with pytest.raises(ClosedError):
                await anext(ended)
        for use in (layers.join, lambda: layers.plan, lambda: layers.resident, lambda: aiter(layers)):
            with pytest.raises(ClosedError):
                use()


@pytest.mark.parametrize("allow", [["full"], ["stream"]])
async def test_a_sweep_that_has_ended_stays_ended(six_layers: Six, allow: list[str], small: Options) -> None:
    async with Loader("host", options=small) as loader, open_stream(loader, six_layers[0], allow=allow) as layers:
        ride = aiter(layers)
        await sweep(ride)
        with pytest.raises(ClosedError):
            await anext(ride)


async def test_closing_wakes_a_ride_that_waits_for_work_and_waits_for_the_work(
    six_layers: Six, nothing_left: Any, small: Options
) -> None:
    device = HostDevice(poison=True)
    async with Loader(device, options=small) as loader:
        stream = device.stream()
        async with nothing_left(loader):
            held, ended = stream.hold(), anyio.Event()

            async def wait(ride: LayerRide) -> None:
                try:
                    with anyio.fail_after(PATIENCE), pytest.raises(ClosedError):
                        await anext(ride)
                finally:
                    assert not held.is_set()
                    held.set()
                    ended.set()

            async with anyio.create_task_group() as group:
                async with open_stream(loader, six_layers[0], slots=6) as layers:
                    ride = layers.join()
                    async for layer in ride:
                        await use_on(layer, stream)
                    group.start_soon(wait, ride)
                    await anyio.sleep(0.02)
                    assert not ended.is_set()
                assert held.is_set()
        await run_in_thread(stream.close)


async def test_a_loader_that_is_closed_ends_its_streams(six_layers: Six, small: Options) -> None:
    device = HostDevice(poison=True)
    begun = anyio.Event()

    async def consume(loader: Loader) -> None:
        with pytest.raises(ClosedError):
            async with open_stream(loader, six_layers[0]) as layers:
                async for layer in layers:
                    with layer.on():
                        begun.set()
                        await anyio.sleep_forever()

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as group, Loader(device, options=small) as loader:
            group.start_soon(consume, loader)
            await begun.wait()
    assert device.memory().free == device.info.total_bytes


async def test_it_is_entered_once_and_used_inside(six_layers: Six, small: Options) -> None:
    async with Loader("host", options=small) as loader:
        layers = open_stream(loader, six_layers[0])
        with pytest.raises(ClosedError):
            layers.join()
        async with layers:
            with pytest.raises(ClosedError):
                await layers.__aenter__()
            assert (await sweep(layers))[0] == ORDER
        with pytest.raises(ClosedError):
            await layers.__aenter__()


async def test_what_the_body_raises_comes_out_as_it_is(six_layers: Six, nothing_left: Any, small: Options) -> None:
    async with Loader("host", options=small) as loader, nothing_left(loader):
        with pytest.raises(ZeroDivisionError):
            async with open_stream(loader, six_layers[0]) as layers:
                async for layer in layers:
                    with layer.on():
                        raise ZeroDivisionError


# Memory


@pytest.mark.parametrize("free", [0, 1, 4096])
async def test_what_does_not_fit_is_said_before_a_byte_moves(
    six_layers: Six, nothing_left: Any, free: int, small: Options
) -> None:
    sizes: list[int] = []
    async with Loader(HostDevice(on_allocate=sizes.append), options=small) as loader, nothing_left(loader):
        with pytest.raises(DoesNotFitError) as caught:
            async with open_stream(loader, six_layers[0], allow=["full", "hybrid", "stream"], free=free):
                pytest.fail("it fits")
        assert caught.value.available <= free < caught.value.needed
        assert not sizes


@feeds
@pytest.mark.parametrize("missing", [1, 100_000, 300_000])
async def test_memory_that_somebody_else_took_leaves_nothing(
    six_layers: Six, nothing_left: Any, host: str, missing: int, small: Options
) -> None:
    options = replace(small, decode="device")
    async with Loader("host", options=options) as loader, open_stream(loader, six_layers[0]) as layers:
        total = layers.plan.total
    device = HostDevice(total_bytes=total - missing)
    async with Loader(device, options=options) as loader, nothing_left(loader):
        with pytest.raises(OutOfDeviceMemoryError):
            async with open_stream(loader, six_layers[0], host=host, free=total, margin=0):
                pytest.fail("it fits")
        streams = options.streams if options.engine == "python" else 0
        assert len(device._streams) == streams, "only the loader's own are open"
        await run_in_thread(loader.tracker.flush)


async def test_a_model_without_layers_has_empty_sweeps(tmp_path: Path, nothing_left: Any, small: Options) -> None:
    data = random_blocks(GGMLType.Q8_0, 8, 0).data
    path = tmp_path / "model.gguf"
    await run_in_thread(write_gguf, path, {"token_embd.weight": (GGMLType.Q8_0, (8, 32), data)})
    async with Loader("host", options=small) as loader, nothing_left(loader):
        async with open_stream(loader, path, allow=["full", "stream"]) as layers:
            assert layers.plan.mode == "full"
            for _ in range(2):
                assert await sweep(layers) == ([], {})
            assert list(layers.resident) == ["token_embd.weight"]
        with pytest.raises(PlanError):
            async with open_stream(loader, path):
                pytest.fail("there is nothing to stream")


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("allow", ["hybrid", "stream"])
@feeds
async def test_no_more_is_taken_than_the_plan_says(
    six_layers: Six,
    nothing_left: Any,
    monkeypatch: pytest.MonkeyPatch,
    small: Options,
    *,
    host: str,
    slots: int,
    allow: str,
) -> None:
    device = HostDevice(poison=True)
    options = replace(small, decode="device")
    async with Loader(device, options=options) as loader, nothing_left(loader):
        tracker, peaks, total = loader.tracker, Counter[str](), 0
        allocate = tracker.allocate

        def watched(nbytes: int, purpose: Purpose, description: str) -> Allocation:
            nonlocal total
            allocation = allocate(nbytes, purpose, description)
            for name, size in tracker.by_purpose().items():
                peaks[name] = max(peaks[name], size)
            total = max(total, tracker.total)
            return allocation

        monkeypatch.setattr(tracker, "allocate", watched)
        stream = device.stream()
        stream.call(lambda: time.sleep(0.03))  # behind which alone anything is freed
        async with open_stream(loader, six_layers[0], host=host, slots=slots, allow=[allow]) as layers:
            for _ in range(3):
                async for layer in layers:
                    with layer.on(stream):
                        stream.call(lambda: time.sleep(0.001))
            breakdown = layers.plan.breakdown
            assert {name: size for name, size in peaks.items() if size > breakdown[name]} == {}
            assert peaks["scratch"] == breakdown["scratch"] == options.suited_to("host").scratch
            assert total <= layers.plan.total
            assert await sweep(layers) == (ORDER, layers_only(six_layers[1]))
            await run_in_thread(stream.close)


@pytest.mark.parametrize("mode", ["full", "stream"])
async def test_the_plan_counts_the_scratch_of_whatever_loads_what_stays(
    six_layers: Six, nothing_left: Any, small: Options, mode: str
) -> None:
    sizes: list[int] = []
    device = HostDevice()

    def count(nbytes: int) -> None:
        memory = device.memory()
        sizes.append(memory.total - memory.free + nbytes)

    device.on_allocate = count
    options = replace(small, decode="device", threads=4)  # the native engine has a stream a thread
    async with (
        Loader(device, options=options) as loader,
        nothing_left(loader),
        open_stream(loader, six_layers[0], allow=[mode]) as layers,
    ):
        assert await sweep(layers) == (ORDER, layers_only(six_layers[1]))
        assert max(sizes) <= layers.plan.total
