"""What a pass says about itself: arithmetic on events whose times are given, and the events of real passes."""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest

from asyncload.device import DeviceMemory, Event, HostDevice, StagingMemory
from asyncload.device._host_stream import HostEvent, HostStream
from asyncload.errors import ClosedError, CopyError, PlanError
from asyncload.gguf import GGMLType
from asyncload.layers import (
    Layer,
    LayerRecord,
    PassStats,
    Sweep,
    add_threads,
    link_rate,
    lower_bound,
    measure_pass,
    trace,
    write_trace,
)
from asyncload.loader import Loader
from asyncload.memory import VramTracker
from asyncload.options import Options
from asyncload.pipeline import ThreadSpan, ThreadSpans
from asyncload.testing import random_blocks, write_gguf
from asyncload.threads import run_in_thread
from tests.layers.models import SMALL

Copies = tuple[tuple[tuple[float, float], ...], ...]  # by stream, in seconds
IN_PYTHON = replace(SMALL, engine="python")  # whose threads and streams can be looked at


@dataclass
class At:
    """An event that passed at a second of some clock."""

    second: float

    def done(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, At)
        return self.second - earlier.second


def simulate(
    copies: Sequence[float], computes: Sequence[float], *, slots: int, begin: float = 0.0, ready: float | None = None
) -> list[LayerRecord]:
    """A pass over one copy queue and one compute queue; a layer whose copy takes 0 is resident.

    The first copy begins at ``begin``, the consumer comes at ``ready`` (None: then too).
    """
    records: list[LayerRecord] = []
    copied, computed, count = begin, begin if ready is None else ready, 0
    slot_free = [begin] * slots
    for number, (copy, compute) in enumerate(zip(copies, computes, strict=True)):
        slot = count % slots if copy else None
        begun = copied if slot is None else max(copied, slot_free[slot])
        if slot is not None:
            copied, count = begun + copy, count + 1
        came, began = computed, computed if slot is None else max(computed, copied)
        computed = began + compute
        if slot is not None:
            slot_free[slot] = computed
        around = [] if slot is None else [[(At(begun), At(copied))]]
        records.append(
            LayerRecord(
                number=number,
                slot=slot,
                nbytes=int(copy * 100),
                copies=around,
                ready=At(came),
                began=At(began),
                ended=[At(computed)],
            )
        )
    return records


def intervals(process: int, document: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Each row's name and what it shows, in microseconds, in order."""
    rows = {
        event["tid"]: event["args"]["name"]
        for event in document["traceEvents"]
        if (event["ph"], event["name"], event["pid"]) == ("M", "thread_name", process)
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in rows.values()}
    for event in document["traceEvents"]:
        if event["ph"] == "X" and event["pid"] == process:
            found[rows[event["tid"]]].append((event["ts"], event["ts"] + event["dur"]))
    return {name: sorted(spans) for name, spans in found.items()}


def assert_no_overlap(document: dict[str, Any], processes: int) -> None:
    for process in range(processes):
        for name, spans in intervals(process, document).items():
            for (_, end), (begin, _) in pairwise(spans):
                assert begin >= end - 1e-3, name  # a nanosecond for what adding floats loses


# Arithmetic


def test_the_bound_is_the_longer_of_two_chains() -> None:
    assert lower_bound([], []) == 0
    assert lower_bound([2, 2, 2], [1, 1, 1]) == 7  # copies, and the last layer's compute
    assert lower_bound([1, 1, 1], [2, 2, 2]) == 7  # the first copy, and all compute
    assert lower_bound([0, 3, 0], [5, 1, 4]) == 10  # the first stays on the device: nothing to wait for


def test_even_layers_reach_the_bound_with_two_slots_and_not_with_one() -> None:
    two = measure_pass(simulate([2] * 4, [2] * 4, slots=2))
    assert (two.wall, two.copy, two.compute, two.lower_bound) == (10, 8, 8, 10)
    assert two.scheduling_stall == 0
    assert two.exposed_stall == 2 / 8
    assert [layer.waited for layer in two.layers] == [2, 0, 0, 0]
    one = measure_pass(simulate([2] * 4, [2] * 4, slots=1))
    assert (one.wall, one.lower_bound, one.scheduling_stall, one.exposed_stall) == (16, 10, 6, 1)


def test_uneven_layers_stall_for_want_of_slots() -> None:
    copies, computes = [0.5, 2, 0.5, 2], [2, 0.5, 2, 0.5]
    few, many = (measure_pass(simulate(copies, computes, slots=slots)) for slots in (1, 4))
    assert few.lower_bound == many.lower_bound == 5.5
    assert few.scheduling_stall == 4.5
    assert many.scheduling_stall == 0
    assert [layer.copy for layer in many.layers] == copies
    assert [layer.compute for layer in many.layers] == computes


def test_resident_layers_take_compute_and_no_copy() -> None:
    stats = measure_pass(simulate([0, 2, 0, 2], [1, 1, 1, 1], slots=2))
    assert (stats.copy, stats.compute, stats.nbytes) == (4, 4, 400)
    assert (stats.lower_bound, stats.wall) == (5, 5)
    assert [(layer.slot, layer.copies) for layer in stats.layers if layer.nbytes == 0] == [(None, ()), (None, ())]


def test_where_nothing_streams_there_is_no_stall() -> None:
    stats = measure_pass(simulate([0, 0], [1, 2], slots=1))
    assert (stats.wall, stats.copy, stats.lower_bound) == (3, 0, 3)
    assert (stats.exposed_stall, stats.scheduling_stall, stats.rate) == (0, 0, 0)


def test_what_was_fetched_ahead_is_copy_time_and_no_part_of_the_pass() -> None:
    stats = measure_pass(simulate([2] * 4, [1] * 4, slots=2, ready=3))
    # the first layer is there, half of the second too; the third waits for the first's slot, which is free at 4
    assert stats.copy == 8
    assert [layer.copy_within for layer in stats.layers] == [0, 1, 2, 2]
    assert stats.layers[0].copies == (((-3, -1),),)
    assert stats.wall == stats.lower_bound == 6
    assert stats.scheduling_stall == 0
    # and it does not matter how long before that was
    idle = measure_pass(simulate([2] * 4, [1] * 4, slots=2, begin=-1000, ready=0))
    assert (idle.wall, idle.copy, idle.compute, idle.lower_bound) == (6, 8, 4, 5)


def record(number: int, copies: Copies, began: float, *ended: float) -> LayerRecord:
    return LayerRecord(
        number=number,
        slot=number,
        copies=[[(At(begun), At(arrived)) for begun, arrived in stream] for stream in copies],
        ready=At(0),
        began=At(began),
        ended=[At(second) for second in ended],
    )


def test_copies_of_several_streams_count_once() -> None:
    copies: list[Copies] = [(((0, 2),), ((0, 6),)), (((2, 5),), ((6, 7),))]
    stats = measure_pass([record(0, copies[0], 6, 7, 9), record(1, copies[1], 8, 11)])
    assert [layer.copy for layer in stats.layers] == [6, 1]
    assert [layer.copies for layer in stats.layers] == copies
    assert [layer.compute for layer in stats.layers] == [3, 2]  # of two rides, until the last has ended
    assert (stats.wall, stats.copy, stats.compute, stats.lower_bound) == (11, 7, 5, 11)
    assert_no_overlap(trace([stats]), 1)


def test_copies_in_chunks_count_where_they_are_made() -> None:
    # two layers that are read at once: their chunks take turns on two streams, and nothing is copied in between
    first: Copies = (((0, 1), (4, 5)), ((0, 2),))
    second: Copies = (((2.5, 3.5), (6, 8)), ((4.5, 5.5), (8, 8)))
    stats = measure_pass([record(0, first, 5, 6), record(1, second, 8, 9)])
    assert [layer.copy for layer in stats.layers] == [3, 1 + 0.5 + 2]
    assert stats.copy == 6.5
    assert stats.lower_bound == max(6.5 + 1, 3 + 2)
    assert stats.scheduling_stall == 9 - 7.5
    document = trace([stats])
    assert_no_overlap(document, 1)
    assert intervals(0, document)["copy stream 1"] == [(0, 2e6), (4.5e6, 5.5e6), (8e6, 8e6)]
    assert intervals(0, document)["slot 1"] == [(2.5e6, 9e6)]


def test_a_layer_of_no_bytes_is_in_its_slot_while_it_is_worked_on() -> None:
    stats = measure_pass([record(0, (), 1, 3), record(1, ((), ()), 4, 5)])
    assert (stats.copy, stats.compute) == (0, 3)
    assert intervals(0, trace([stats]))["slot 1"] == [(4e6, 5e6)]


def test_rate_and_share_of_the_link() -> None:
    stats = measure_pass(simulate([2, 2], [1, 1], slots=2))
    assert stats.rate == 400 / 4
    assert stats.share_of(125) == 0.8
    for none in (0, -1.0, float("nan")):
        with pytest.raises(PlanError):
            stats.share_of(none)


class MeteredDevice(HostDevice):
    """Copies 5 GB in a second, until one fails."""

    def __init__(self) -> None:
        super().__init__()
        self.uploaded = 0
        self.fails = False

    def stream(self) -> Any:
        return self

    def upload(self, target: DeviceMemory, _from: int, staging: StagingMemory, _to: int, nbytes: int) -> None:
        assert target.nbytes >= nbytes <= staging.nbytes
        self.uploaded += nbytes
        if self.fails:
            raise CopyError("a copy failed", device="host")

    def record(self, *, timing: bool) -> At:
        assert timing
        return At(self.uploaded / 5e9)


def test_the_links_rate_is_that_of_copies_by_themselves() -> None:
    device = MeteredDevice()
    tracker = VramTracker(device)
    assert link_rate(device, tracker) == pytest.approx(5e9)
    assert tracker.total == 0
    device.fails = True
    with pytest.raises(CopyError):
        link_rate(device, tracker)
    assert tracker.total == 0
    tracker.close()


def test_no_layers_are_no_pass() -> None:
    with pytest.raises(PlanError):
        measure_pass([])


def test_a_trace_has_a_row_for_each_stream_and_slot(tmp_path: Path) -> None:
    passes = [
        measure_pass(simulate([2, 0, 2, 2], [1, 1, 1, 3], slots=2)),
        measure_pass(simulate([2, 0, 2, 2], [1, 1, 1, 3], slots=2, ready=3)),
    ]
    write_trace(tmp_path / "trace.json", passes)
    document = json.loads((tmp_path / "trace.json").read_text())
    for process in (0, 1):
        rows = intervals(process, document)
        assert list(rows) == ["copy stream 0", "compute", "slot 0", "slot 1"]
        assert {name: len(spans) for name, spans in rows.items()} == {
            "copy stream 0": 3,
            "compute": 4,
            "slot 0": 2,
            "slot 1": 1,
        }
    assert_no_overlap(document, 2)
    assert intervals(1, document)["slot 0"][0] == (0, 4e6)  # from its copy's begin to the end of the work
    assert intervals(0, document)["copy stream 0"][0] == (3e6, 5e6)  # both passes begin at the same place
    named = {
        event["pid"]: event["args"]["name"] for event in document["traceEvents"] if event["name"] == "process_name"
    }
    assert named == {0: "pass 0", 1: "pass 1"}
    assert trace([])["traceEvents"] == []


def test_threads_are_rows_of_a_trace() -> None:
    stats = measure_pass(simulate([2, 2], [1, 1], slots=2))
    spans = (
        ThreadSpan("reader", "read a", -3, -1),
        ThreadSpan("feeder", "enqueue layer 0", 0, 1),
        ThreadSpan("reader", "read b", -1, 2),
    )
    document = trace([replace(stats, threads=spans)])
    rows = intervals(0, document)
    assert [*rows][-2:] == ["thread feeder", "thread reader"]
    assert rows["thread reader"] == [(0, 2e6), (2e6, 5e6)]  # what was first is where the trace begins
    assert rows["copy stream 0"][0] == (3e6, 5e6)
    assert {"read a", "read b", "enqueue layer 0"} <= {event["name"] for event in document["traceEvents"]}
    assert_no_overlap(document, 1)


class AtStream(HostStream):
    """Passes an event at a second of the device's clock, of which the host's is ``ahead``."""

    def __init__(self, ahead: float, now: list[float]) -> None:
        self._ahead, self._now = ahead, now

    def record(self, *, timing: bool = False) -> Any:
        assert timing
        self._now[0] += 0.5  # what it takes until the host knows
        return At(self._now[0] - 0.25 - self._ahead)


def test_threads_come_to_the_clock_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    spans, zero = ThreadSpans(), 1000.0  # the host's moment of the pass's begin
    stats = measure_pass(simulate([2, 2], [1, 1], slots=2, begin=-1, ready=0))  # ends at 4, copies from -1 on
    with spans.watch():
        for begin, end in ((-9, -1.5), (-2, -1.125), (-1, 0.5), (3, 5), (4.25, 6), (4.5, 7)):
            now[0] = zero + begin
            with spans.span(f"from {begin}"):
                now[0] = zero + end
        placed = add_threads(stats, At(zero - 123), spans, AtStream(123, now))
    assert stats.wall == 4
    assert [(span.what, span.begin, span.end) for span in placed.threads] == [
        ("from -2", -2, -1.125),
        ("from -1", -1, 0.5),
        ("from 3", 3, 5),
        ("from 4.25", 4.25, 6),
    ]
    assert {span.thread for span in placed.threads} == {threading.current_thread().name}
    assert replace(placed, threads=()) == stats


def test_spans_are_kept_while_somebody_watches() -> None:
    spans = ThreadSpans()

    def found() -> list[str]:
        return [span.what for span in spans.during(float("-inf"), float("inf"))]

    with spans.span("unseen"):
        pass
    with spans.watch():
        with spans.watch(), suppress(ZeroDivisionError), spans.span("one"):
            raise ZeroDivisionError
        with spans.span("two"):
            pass
        assert found() == ["one", "two"]
        late = spans.span("late")
        late.__enter__()
    assert found() == []
    late.__exit__(None, None, None)
    assert found() == []


# Real passes


async def make_model(path: Path, layers: int) -> Path:
    """Layers of different sizes."""
    tensors: dict[str, Any] = {"token_embd.weight": (GGMLType.Q8_0, (8, 32), random_blocks(GGMLType.Q8_0, 8, 0).data)}
    for layer in range(layers):
        rows = 64 * (1 + layer % 3)
        packed = random_blocks(GGMLType.Q8_0, rows * 4, seed=layer)
        tensors[f"blk.{layer}.ffn_down.weight"] = (GGMLType.Q8_0, (rows, 128), packed.data)
    await run_in_thread(write_gguf, path, tensors)
    return path


def work(layer: Layer, stream: HostStream) -> None:
    with layer.on(stream):
        stream.call(lambda: time.sleep(0.001))


def check(stats: PassStats) -> None:
    """What holds in any pass, whatever its times."""
    tick = 1e-9  # what adding floats loses; the times come from one clock
    assert stats.wall >= stats.lower_bound - tick
    assert stats.wall >= stats.compute - tick
    assert stats.wall == max(layer.work[1] for layer in stats.layers)
    assert stats.scheduling_stall == stats.wall - stats.lower_bound
    assert stats.copy == pytest.approx(sum(layer.copy for layer in stats.layers))
    assert stats.compute == pytest.approx(sum(layer.compute for layer in stats.layers))
    assert all(layer.compute > 0 for layer in stats.layers)
    for layer in stats.layers:
        assert layer.work[0] >= max((arrived for stream in layer.copies for _, arrived in stream), default=0) - tick
        assert 0 <= layer.copy_within <= layer.copy + tick
        assert layer.waited >= 0
        assert (layer.slot is None) == (layer.copies == ()) == (layer.nbytes == 0)


@pytest.mark.anyio
@pytest.mark.parametrize("dtype", ["packed", "f16"])
@pytest.mark.parametrize("decode", ["host", "device"])
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("host", ["slabs", "file"])
async def test_identities_of_real_passes(
    tmp_path: Path,
    small: Options,
    *,
    host: Literal["slabs", "file"],
    slots: int,
    dtype: str,
    decode: Literal["host", "device"],
) -> None:
    path = await make_model(tmp_path / "model.gguf", 5)
    device = HostDevice(bandwidth=300e6, latency=0.0001)
    passes: list[PassStats] = []
    options = replace(small, decode=decode)
    async with (
        Loader(device, options=options) as loader,
        loader.stream(path, dtype=dtype, slots=slots, allow=["stream"], host=host, workspace=0, kv_bytes=0) as layers,
    ):
        layers._active().wait_for_arrival = False
        stream = device.stream()
        for _ in range(3):
            async for layer in layers:
                work(layer, stream)
            passes.append(await layers.last_pass())
        plan = layers.plan
        await run_in_thread(stream.close)
    n_streams = 2 if host == "file" or (dtype, decode) == ("f16", "device") else 1
    for stats in passes:
        check(stats)
        assert [layer.number for layer in stats.layers] == list(range(5))
        assert stats.nbytes == plan.sweep_nbytes
        assert {layer.slot for layer in stats.layers} == set(range(slots))
        for timing in stats.layers:
            copies = [len(spans) for spans in timing.copies]
            chunks = len([*plan.layers[timing.number].load.chunks()])
            assert sum(copies) == (chunks if host == "file" else n_streams)
            assert len(copies) == n_streams
    await run_in_thread(write_trace, tmp_path / "trace.json", passes)
    document = json.loads(await run_in_thread((tmp_path / "trace.json").read_text))
    for process in range(3):
        assert list(intervals(process, document)) == [
            *(f"copy stream {index}" for index in range(n_streams)),
            "compute",
            *(f"slot {index}" for index in range(slots)),
        ]
    assert_no_overlap(document, 3)


class ListingDevice(HostDevice):
    """Knows the streams that it has opened."""

    def __init__(self) -> None:
        super().__init__()
        self.streams: list[HostStream] = []

    def stream(self) -> HostStream:
        self.streams.append(super().stream())
        return self.streams[-1]


@pytest.mark.anyio
async def test_waiting_for_a_copy_is_seen(tmp_path: Path) -> None:
    path = await make_model(tmp_path / "model.gguf", 3)
    device = ListingDevice()
    async with (
        Loader(device, options=IN_PYTHON) as loader,
        loader.stream(path, slots=1, allow=["stream"], workspace=0, kv_bytes=0) as layers,
    ):
        layers._active().wait_for_arrival = False
        copies, stream = device.streams[-1], device.stream()
        with layers.join() as ride:
            layer = await anext(ride)
            held = copies.hold()  # the next layer's copy comes behind it
            work(layer, stream)
            work(await anext(ride), stream)
            ready = ride._ride.sweep.uses[1].ready
            assert isinstance(ready, HostEvent)
            came = await run_in_thread(ready._passed.wait, 10)
            held.set()
            assert came
            async for layer in ride:
                work(layer, stream)
        stats = await layers.last_pass()
        await run_in_thread(stream.close)
    check(stats)
    first, second, _ = stats.layers
    assert second.waited > 0
    assert second.work[0] - second.waited < second.copies[0][0][0]  # it came before the copy had begun
    assert stats.scheduling_stall > 0
    assert stats.wall >= first.compute + second.waited + second.compute


@pytest.mark.anyio
@pytest.mark.parametrize("host", ["slabs", "file"])
async def test_what_threads_did_is_told_if_it_was_to_be_noted(
    tmp_path: Path, host: Literal["slabs", "file"], small: Options
) -> None:
    path = await make_model(tmp_path / "model.gguf", 4)
    device = HostDevice()
    async with Loader(device, options=small) as loader:
        stream = device.stream()
        for noted in (True, False):
            async with loader.stream(
                path, dtype="f16", allow=["stream"], host=host, trace=noted, workspace=0, kv_bytes=0
            ) as layers:
                async for layer in layers:
                    work(layer, stream)
                check(stats := await layers.last_pass())
                if not noted:
                    assert stats.threads == ()
                    continue
                did = {(span.thread.rstrip("0123456789"), span.what) for span in stats.threads}
                for number in (2, 3):  # those before may have been enqueued ahead of the first copy's begin
                    name = f"blk.{number}.ffn_down.weight"
                    expected = {
                        ("python", "slabs"): {
                            ("asyncload-layers_", f"enqueue layer {number}"),
                            ("asyncload-layers-wait_", "wait"),
                        },
                        ("python", "file"): {
                            ("asyncload-reader_", f"read {name}"),
                            ("asyncload-reader_", f"decode {name}"),
                            ("asyncload-stream", f"enqueue {name}"),
                            ("asyncload-events", f"wait for {name}"),
                        },
                        ("native", "slabs"): {
                            ("asyncload-feed", f"enqueue layer {number}"),
                            ("asyncload-slots", f"wait for the slot of layer {number}"),
                            ("asyncload-copy", f"wait for layer {number}"),
                        },
                        ("native", "file"): {
                            ("asyncload-worker_", f"{what} {name}")
                            for what in ("read", "decode", "enqueue", "wait for")
                        },
                    }
                    assert expected[small.engine, host] <= did
                assert_no_overlap(trace([stats]), 1)
        assert loader._active().spans.during(float("-inf"), float("inf")) == []
        await run_in_thread(stream.close)


@pytest.mark.anyio
async def test_layers_that_stay_are_timed_too(tmp_path: Path, small: Options) -> None:
    path = await make_model(tmp_path / "model.gguf", 6)
    device = HostDevice()
    async with (
        Loader(device, options=small) as loader,
        loader.stream(path, slots=1, free=90_000, allow=["hybrid"], margin=0, workspace=0, kv_bytes=0) as layers,
    ):
        stream = device.stream()
        async for layer in layers:
            work(layer, stream)
        stats = await layers.last_pass()
        resident = layers.plan.resident
        await run_in_thread(stream.close)
    check(stats)
    assert 0 < len(resident) < 6
    assert [layer.number for layer in stats.layers] == list(range(6))
    assert tuple(layer.number for layer in stats.layers if layer.slot is None) == resident


@pytest.mark.anyio
async def test_two_rides_make_one_pass(tmp_path: Path, small: Options) -> None:
    path = await make_model(tmp_path / "model.gguf", 4)
    device = HostDevice()
    async with (
        Loader(device, options=small) as loader,
        loader.stream(path, allow=["stream"], workspace=0, kv_bytes=0) as layers,
    ):
        streams = [device.stream(), device.stream()]
        with layers.join() as first, layers.join() as second:
            for _ in range(4):
                work(await anext(first), streams[0])
                work(await anext(second), streams[1])
            with pytest.raises(StopAsyncIteration):
                await anext(first)
            with pytest.raises(PlanError, match="no ride has passed"):
                await layers.last_pass()  # the second is still in it
            with pytest.raises(StopAsyncIteration):
                await anext(second)
            stats = await layers.last_pass()
        for stream in streams:
            await run_in_thread(stream.close)
    check(stats)
    assert_no_overlap(document := trace([stats]), 1)
    rows = intervals(0, document)
    assert [len(rows[f"compute, ride {ride}"]) for ride in range(2)] == [4, 4]
    assert "compute" not in rows
    for timing in stats.layers:
        (begin, _), *_ = spans = [*timing.rides.values()]
        assert (begin, max(end for _, end in spans)) == timing.work


@pytest.mark.anyio
async def test_passes_without_known_times_say_so(tmp_path: Path, small: Options) -> None:
    path = await make_model(tmp_path / "model.gguf", 3)
    device = HostDevice()
    async with Loader(device, options=small) as loader:
        stream = device.stream()
        async with loader.stream(path, allow=["stream"], workspace=0, kv_bytes=0) as layers:
            with pytest.raises(PlanError, match="no ride has passed"):
                await layers.last_pass()
            async for layer in layers:
                with layer.on():
                    pass
            with pytest.raises(PlanError, match="without a stream"):
                await layers.last_pass()
            async for layer in layers:
                if layer.number != 1:
                    work(layer, stream)
            with pytest.raises(PlanError, match="layer 1 was not used"):
                await layers.last_pass()
            async for layer in layers:
                work(layer, stream)
            whole = await layers.last_pass()
            async for layer in layers:
                work(layer, stream)
                break
            assert await layers.last_pass() == whole  # the one that was left early does not count
        with pytest.raises(ClosedError):
            await layers.last_pass()
        await run_in_thread(stream.close)


@pytest.mark.anyio
async def test_sweeps_that_have_passed_are_forgotten(tmp_path: Path, small: Options) -> None:
    path = await make_model(tmp_path / "model.gguf", 3)
    device = HostDevice()
    counts: list[int] = []
    async with (
        Loader(device, options=small) as loader,
        loader.stream(path, allow=["stream"], workspace=0, kv_bytes=0) as layers,
    ):
        stream = device.stream()
        kept: list[object] = []  # by a consumer who holds on to whatever it was given
        for _ in range(12):
            ride = layers.join()
            for _ in range(3):
                layer = await anext(ride)
                work(layer, stream)
                kept.append(layer)
            ride.close()
            kept.append(ride)
            async for layer in layers:
                work(layer, stream)
            await layers.last_pass()
            gc.collect()
            counts.append(sum(type(item) is Sweep and len(item.uses) > 0 for item in gc.get_objects()))
        await run_in_thread(stream.close)
    assert max(counts[6:]) <= max(counts[:6])
