"""Copies that fail under work on streams, rides that are in the way, and a stream that is closed under its users."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from asyncload.device import HostDevice, Stream
from asyncload.device._host_stream import HostStream
from asyncload.errors import ClosedError, CopyError, DeviceError, SourceReadError, StalledError
from asyncload.layers import Fed, Layer, Slot
from asyncload.loader import LayerRide, LayerStream, Loader, read_header
from asyncload.memory import Purpose
from asyncload.options import EngineOption, Options
from asyncload.plan import LayerPlan
from asyncload.testing import NativeRaceDevice, RaceDevice
from asyncload.threads import run_in_thread
from tests.layers.models import Content, finish, layers_only, open_stream
from tests.loader.conftest import FailingFile

pytestmark = pytest.mark.anyio
Six = tuple[Path, Content]
PATIENCE = 20.0  # seconds; it matters only where something hangs
COPIES = 7  # of a stream whose layers are copied as they are: what stays, and six layers
packed = {"dtype": "packed", "host": "slabs"}
in_python = pytest.mark.parametrize("engine", ["python"])  # whose copies can be caught


class Gpu:
    """A host device that stands for a GPU, and a consumer on it; Python's copies can be caught as they are enqueued."""

    def __init__(self, engine: EngineOption) -> None:
        self.host = HostDevice(poison=True)
        self.device: RaceDevice
        if engine == "native":
            self.device = NativeRaceDevice(self.host)
        else:
            self.device = RaceDevice(self.host, before_copy=self._count)
        self.copies = 0
        self.catch: dict[int, Callable[[Any], object]] = {}  # by the number of the copy, from 1 on
        self.stream = self.host.stream()
        self.seen: Content = {}

    def _count(self, stream: Stream) -> None:
        self.copies += 1
        if self.copies in self.catch:
            self.catch[self.copies](stream)

    def fail(self, copy: int, **how: Any) -> None:
        if isinstance(self.device, NativeRaceDevice):
            self.host.fail_upload(copy, **how)
        else:
            self.catch[copy] = lambda _: self.host.fail_upload(1, **how)

    def read(self, name: str, address: int, nbytes: int) -> None:
        """Enqueues it."""

        def read() -> None:
            self.seen[name] = ctypes.string_at(address, nbytes)

        self.stream.call(read)

    def use(self, layer: Layer) -> None:
        with layer.on(self.stream):
            for tensor in layer.values():
                self.read(tensor.name, tensor.address, tensor.nbytes)

    async def sweep(self, layers: LayerStream | LayerRide) -> Content:
        self.seen.clear()
        async for layer in layers:
            self.use(layer)
        await run_in_thread(finish, self.host, self.stream)
        return dict(self.seen)


@pytest.fixture
def gpu(engine: EngineOption) -> Gpu:
    return Gpu(engine)


@pytest.fixture(scope="session")
def content(six_layers: Six) -> Content:
    """What the layers are, packed."""
    from asyncload import blocking

    model = blocking.load(six_layers[0], device="host")
    return layers_only({name: tensor.numpy().tobytes() for name, tensor in model.items()})


# Reads


async def test_a_read_that_fails_as_slabs_are_filled_names_a_tensor(
    six_layers: Six, nothing_left: Any, small: Options, failing_file: FailingFile, engine: EngineOption
) -> None:
    first = 2 if engine == "native" else 3  # behind what stays on the device, and the header's in Python
    source = failing_file(six_layers[0], dict.fromkeys(range(first, 1000), errno.EBADF))
    async with Loader("host", options=small) as loader, nothing_left(loader):
        with pytest.raises(SourceReadError) as caught:
            async with open_stream(loader, source, **packed):
                pass
    header = await read_header(six_layers[0])
    error = caught.value
    assert error.tensor is not None
    assert error.tensor.startswith("blk.")
    assert error.offset == header.tensors[error.tensor].offset


# Copies


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("slots", [1, 2, 6])
@pytest.mark.parametrize("failing", [0, 3, 5])
async def test_a_copy_that_fails_on_its_way_reaches_all_rides_within_the_sweep(
    six_layers: Six,
    content: Content,
    nothing_left: Any,
    gpu: Gpu,
    small: Options,
    *,
    failing: int,
    slots: int,
    count: int,
) -> None:
    gpu.fail(2 + failing)
    async with (
        Loader(gpu.device, options=small) as loader,
        nothing_left(loader),
        open_stream(loader, six_layers[0], slots=slots, **packed) as layers,
    ):
        given: list[int] = []

        async def consume(ride: LayerRide) -> None:
            with pytest.raises(CopyError) as caught:
                async for layer in ride:
                    gpu.use(layer)
                    given.append(layer.number)
            assert caught.value.layer == failing
            first = layers.plan.layers[failing].load.tensors[0].info
            assert (caught.value.tensor, caught.value.offset) == (first.name, first.offset)

        rides = [layers.join() for _ in range(count)]
        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as group:
                for ride in rides:
                    group.start_soon(consume, ride)
            assert max(given, default=0) <= failing + slots
            for ride in rides[1:]:
                ride.close()
            for _ in range(2):
                assert await gpu.sweep(rides[0]) == content


@in_python
async def test_of_several_errors_the_first_one_counts(
    six_layers: Six, gpu: Gpu, monkeypatch: pytest.MonkeyPatch, small: Options
) -> None:
    upload, record, refused = HostStream.upload, HostStream.record, list[HostStream]()

    def watched(stream: HostStream, *args: Any) -> None:
        try:
            upload(stream, *args)
        except CopyError:
            refused.append(stream)
            raise

    def record_nothing_more(stream: HostStream, **how: Any) -> Any:
        if stream in refused:
            refused.remove(stream)
            raise DeviceError("host: no event", device="host")
        return record(stream, **how)

    monkeypatch.setattr(HostStream, "upload", watched)
    monkeypatch.setattr(HostStream, "record", record_nothing_more)
    async with Loader(gpu.device, options=small) as loader, open_stream(loader, six_layers[0], **packed) as layers:
        ride = layers.join()
        gpu.fail(2, refused=True)
        with anyio.fail_after(PATIENCE), pytest.raises(CopyError):
            await gpu.sweep(ride)
        assert not refused


@in_python
async def test_a_sweep_does_not_end_before_its_last_copy(
    six_layers: Six, content: Content, gpu: Gpu, small: Options
) -> None:
    holds: list[Any] = []
    gpu.catch[COPIES] = lambda stream: holds.append(stream.hold())
    async with (
        Loader(gpu.device, options=small) as loader,
        open_stream(loader, six_layers[0], slots=6, **packed) as layers,
    ):
        ride = layers.join()
        for number in range(6):
            layer = await anext(ride)
            assert layer.number == number
            gpu.use(layer)
        try:
            with anyio.move_on_after(0.05) as scope:
                await ride.__anext__()
            assert scope.cancelled_caught
        finally:
            for hold in holds:
                hold.set()
        with anyio.fail_after(PATIENCE):
            with pytest.raises(StopAsyncIteration):
                await ride.__anext__()
            assert await gpu.sweep(ride) == content


@in_python
async def test_a_copy_that_failed_is_told_before_a_layer_that_stays(
    six_layers: Six, content: Content, gpu: Gpu, small: Options
) -> None:
    holds: list[Any] = []

    def fail(stream: Any) -> None:
        holds.append(stream.hold())
        gpu.host.fail_upload(1)

    async with Loader(gpu.device, options=small) as loader:
        async with open_stream(loader, six_layers[0], **packed) as layers:
            room = max(layer.nbytes for layer in layers.plan.layers.values())
            free = layers.plan.total + room
        async with open_stream(loader, six_layers[0], allow=["hybrid"], free=free, margin=0, **packed) as layers:
            assert layers.plan.resident == (1, 4)
            scheduler, ride = layers._active().scheduler, layers.join()
            feed, one = scheduler._feed, anyio.Lock()

            async def watched(layer: LayerPlan, slot: Slot) -> Fed:
                async with one:
                    if layer.number == 3 and not holds:
                        gpu.catch[gpu.copies + 1] = fail
                    return await feed(layer, slot)

            scheduler._feed = watched
            with anyio.fail_after(PATIENCE):
                try:
                    for number in range(4):
                        layer = await anext(ride)
                        assert layer.number == number
                        gpu.use(layer)
                finally:
                    for hold in holds:
                        hold.set()
                while ride._ride.sweep.error is None:
                    await anyio.sleep(0.001)
                with pytest.raises(CopyError):
                    await anext(ride)
                assert await gpu.sweep(ride) == content


@in_python
@pytest.mark.parametrize("refused", [False, True])
async def test_an_error_that_lasts_is_raised_in_each_sweep_and_nothing_hangs_or_stays(
    six_layers: Six, gpu: Gpu, monkeypatch: pytest.MonkeyPatch, small: Options, *, refused: bool
) -> None:
    made: list[Any] = []
    staging = gpu.device.staging

    def watched(nbytes: int) -> Any:
        made.append(staging(nbytes))
        return made[-1]

    monkeypatch.setattr(gpu.device, "staging", watched)
    gpu.fail(5, refused=refused, lasting=True)
    with anyio.fail_after(PATIENCE), pytest.raises(CopyError):
        async with (
            Loader(gpu.device, options=small) as loader,
            open_stream(loader, six_layers[0], **packed) as layers,
        ):
            ride = layers.join()
            for _ in range(3):
                with pytest.raises(CopyError):
                    await gpu.sweep(ride)
    assert gpu.host.memory().free == gpu.host.info.total_bytes
    assert len(made) > len(layers_only(six_layers[1])) / 2  # the slabs, a layer each
    assert all(memory._pages is None for memory in made)


# Rides in the way


@pytest.mark.parametrize("where", ["between", "with a layer", "inside"])
async def test_a_ride_that_idles_alone_is_left_behind_for_those_that_wait(
    six_layers: Six, content: Content, nothing_left: Any, gpu: Gpu, small: Options, *, where: str
) -> None:
    async with (
        Loader(gpu.device, options=replace(small, stall_limit=0.05)) as loader,
        nothing_left(loader),
        open_stream(loader, six_layers[0], **packed) as layers,
    ):
        idle, stalls, swept = layers.join(), anyio.Event(), anyio.Event()

        async def stall() -> None:
            gpu.use(await anext(idle))
            kept = await anext(idle) if where != "between" else None
            if kept is not None and where == "inside":
                with kept.on(gpu.stream):
                    stalls.set()
                    await swept.wait()
            stalls.set()
            await swept.wait()
            with pytest.raises(StalledError):
                await anext(idle)

        async with anyio.create_task_group() as group:
            group.start_soon(stall)
            with anyio.fail_after(PATIENCE):
                await stalls.wait()
                later = layers.join()
                for _ in range(2):
                    assert await gpu.sweep(later) == content
            swept.set()


# The end


class User:
    """Another task inside of a layer's block, and what it finds there after the stream has been closed."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self.inside = anyio.Event()
        self.go_on = anyio.Event()
        self.left = False
        self.slot_nbytes = 0

    async def work(self, layers: LayerStream) -> None:
        ride, self.slot_nbytes = layers.join(), layers.plan.slot_nbytes
        layer = await anext(ride)
        with layer.on(self._gpu.stream):
            self.inside.set()
            with anyio.fail_after(PATIENCE, shield=True):
                await self.go_on.wait()
            for tensor in layer.values():
                self._gpu.read(tensor.name, tensor.address, tensor.nbytes)
            self.left = True
        with pytest.raises(ClosedError):
            await anext(ride)


def first(content: Content) -> Content:
    return {name: data for name, data in content.items() if name.startswith("blk.0.")}


@pytest.mark.parametrize("allow", ["full", "stream"])
async def test_closing_waits_for_the_blocks_of_other_tasks(
    six_layers: Six, content: Content, nothing_left: Any, gpu: Gpu, small: Options, *, allow: str
) -> None:
    user = User(gpu)

    async def end() -> None:
        await anyio.wait_all_tasks_blocked()
        user.go_on.set()

    async with Loader(gpu.device, options=small) as loader, nothing_left(loader):
        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as group:
                async with open_stream(loader, six_layers[0], allow=[allow], **packed) as layers:
                    group.start_soon(user.work, layers)
                    await user.inside.wait()
                    group.start_soon(end)
                assert user.left
        await run_in_thread(finish, gpu.host, gpu.stream)
        assert gpu.seen == first(content)


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("allow", ["full", "stream"])
async def test_what_a_block_uses_outlives_the_stream(
    six_layers: Six, content: Content, nothing_left: Any, gpu: Gpu, small: Options, *, allow: str, cancelled: bool
) -> None:
    """Where the block takes too long, and where whoever closes is cancelled."""
    options = replace(small, stall_limit=PATIENCE) if cancelled else replace(small, stall_limit=0.05)
    user = User(gpu)
    async with Loader(gpu.device, options=options) as loader, nothing_left(loader):
        async with anyio.create_task_group() as group:
            with anyio.CancelScope() as scope:
                async with open_stream(loader, six_layers[0], allow=[allow], **packed) as layers:
                    group.start_soon(user.work, layers)
                    with anyio.fail_after(PATIENCE):
                        await user.inside.wait()
                    if cancelled:
                        scope.cancel()
            assert not user.left
            await run_in_thread(loader.tracker.flush)
            held = loader.tracker.by_purpose()
            if allow == "stream":
                assert held == {Purpose.SLOTS: user.slot_nbytes}
            else:
                assert list(held) == [Purpose.WEIGHTS]
            user.go_on.set()
        await run_in_thread(finish, gpu.host, gpu.stream)
        await run_in_thread(loader.tracker.flush)
        assert loader.tracker.total == 0
    assert gpu.seen == first(content)


@pytest.mark.parametrize("host", ["slabs", "file"])
async def test_who_asks_what_a_pass_took_while_the_stream_is_closed_is_answered(
    six_layers: Six, nothing_left: Any, gpu: Gpu, small: Options, host: str
) -> None:
    async with Loader(gpu.device, options=small) as loader, nothing_left(loader):
        answers: list[str] = []

        async def ask(layers: LayerStream) -> None:
            try:
                answers.append(f"{len((await layers.last_pass()).layers)} layers")
            except ClosedError:
                answers.append("closed")

        with anyio.fail_after(PATIENCE):
            async with (
                anyio.create_task_group() as group,
                open_stream(loader, six_layers[0], host=host) as layers,
            ):
                await gpu.sweep(layers)
                for _ in range(3):
                    group.start_soon(ask, layers)
                await checkpoint()
                group.start_soon(ask, layers)
        assert set(answers) <= {"6 layers", "closed"}
        assert len(answers) == 4
