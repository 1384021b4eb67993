"""The C++ threads that bring layers into slots, by themselves, on the host device."""

from __future__ import annotations

import ctypes
import select
import time
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytestmark = pytest.mark.native
PATIENCE = 20.0  # seconds; it matters only where something hangs
NBYTES = 4096
SLOW = 0.02  # seconds
KERNEL = ctypes.CFUNCTYPE(ctypes.c_int32, *3 * [ctypes.c_ssize_t])
Bytes = NDArray[np.uint8]


class Bench:
    """Layers of one piece each, a slow device, and feeds of them."""

    def __init__(self, layers: int = 3) -> None:
        self.module: Any = import_module("asyncload_native")
        self.device: Any = self.module.HostDevice()
        self.layers: list[Bytes] = [np.full(NBYTES, 1 + layer, np.uint8) for layer in range(layers)]

    def slow(self, seconds: float) -> None:
        self.device.set_pace(0.0, seconds, poison=True)

    @contextmanager
    def feed(self, *, each_arrival: bool = False, trace: bool = False) -> Generator[Any]:
        pieces = [np.array([[layer.ctypes.data, NBYTES, 0, 0, 0, 0]], np.uint64) for layer in self.layers]
        feed = self.module.LayerFeed(
            self.device, pieces, streams=1, scratch=[], each_arrival=each_arrival, trace=trace, nice=0
        )
        try:
            yield feed
        finally:
            feed.close()


def wakes(feed: Any, seconds: float = PATIENCE) -> bool:
    """Whether there is something to be told, within some seconds."""
    return bool(select.select([feed.descriptor], [], [], seconds)[0])


def hear(feed: Any, news: list[Any]) -> None:
    assert wakes(feed)
    news.extend(feed.poll())


def hear_all(feed: Any, count: int) -> list[Any]:
    news: list[Any] = []
    while len(news) < count:
        hear(feed, news)
    return news


def test_layers_come_whole_and_only_what_is_waited_for_wakes() -> None:
    bench = Bench()
    bench.slow(SLOW)
    slots = [np.zeros(NBYTES, np.uint8) for _ in range(3)]
    with bench.feed() as feed:
        asked: list[float] = []  # by the clock of the events
        for layer, slot in enumerate(slots):
            asked.append(time.perf_counter())
            assert feed.feed(layer, slot.ctypes.data, []) == layer
        told, waking = list[Any](), 0
        while len(told) < 6:
            hear(feed, told)
            waking += 1
        assert waking <= 4  # for each layer once it is enqueued, and for the last one's arrival
        assert not wakes(feed, 0)
    assert [news.number for news in told if not news.has_arrived] == [0, 1, 2]
    assert [news.number for news in told if news.has_arrived] == [0, 1, 2]
    assert all(news.failure is None for news in told)
    assert [slot.tobytes() for slot in slots] == [layer.tobytes() for layer in bench.layers]
    for news in told:
        if not news.has_arrived:
            assert news.begun[0].passed_at <= news.arrived[0].passed_at
            assert news.arrived[0].passed_at - asked[news.number] > SLOW / 2


def test_where_arrivals_are_waited_for_nothing_else_wakes() -> None:
    bench, slot = Bench(), np.zeros(NBYTES, np.uint8)
    with bench.feed(each_arrival=True) as feed:
        for layer in range(3):
            feed.feed(layer, slot.ctypes.data, [])
            news: list[Any] = []
            hear(feed, news)
            assert [each.has_arrived for each in news] == [False, True]
            assert slot.tobytes() == bench.layers[layer].tobytes()


def test_copies_wait_on_the_device_for_what_had_the_slot_and_then_the_layer_is_told_of() -> None:
    bench = Bench()
    with bench.feed() as feed, bench.feed() as other:
        slot, elsewhere = np.zeros(NBYTES, np.uint8), np.zeros(NBYTES, np.uint8)
        bench.slow(5 * SLOW)
        other.feed(0, elsewhere.ctypes.data, [])  # stands for the work
        work = hear_all(other, 1)[0].arrived[0]
        assert feed.feed(2, slot.ctypes.data, [work]) == 0
        fed, arrived = hear_all(feed, 2)
        assert arrived.has_arrived
        assert fed.begun[0].passed_at >= work.passed_at
        assert slot.tobytes() == bench.layers[2].tobytes()
        other.feed(1, elsewhere.ctypes.data, [])
        work = next(news for news in hear_all(other, 1) if not news.has_arrived).arrived[0]
        feed.feed(0, slot.ctypes.data, [work])
        assert hear_all(feed, 1)[0].number == 1
        assert work.done()


def test_a_layer_is_told_of_when_the_arrival_of_the_one_before_in_its_slot_has_been() -> None:
    bench = Bench()
    slots = [np.zeros(NBYTES, np.uint8) for _ in range(2)]
    with bench.feed() as feed:
        for number in range(30):
            feed.feed(number % 3, slots[number % 2].ctypes.data, [])
        told = [(news.number, news.has_arrived) for news in hear_all(feed, 60)]
    assert sorted(told) == [(number, arrived) for number in range(30) for arrived in (False, True)]
    for number in range(28):
        assert told.index((number, True)) < told.index((number + 2, False))


def test_a_copy_that_fails_is_told_of_and_those_after_it_come() -> None:
    bench, slot = Bench(), np.zeros(NBYTES, np.uint8)
    with bench.feed() as feed:
        bench.device.fail_copy(2)
        for layer in range(3):
            feed.feed(layer, slot.ctypes.data, [])
        failures = {news.number: news.failure for news in hear_all(feed, 6) if news.has_arrived}
        assert failures[0] is failures[2] is None
        assert "a copy failed" in failures[1].what
        assert failures[1].of_copy
        assert slot.tobytes() == bench.layers[2].tobytes()


def test_closing_does_what_was_asked_for_and_then_nothing_writes_the_slots() -> None:
    bench = Bench()
    bench.slow(SLOW)
    slots = [np.zeros(NBYTES, np.uint8) for _ in range(3)]
    with bench.feed() as feed:
        for layer, slot in enumerate(slots):
            feed.feed(layer, slot.ctypes.data, [])
    assert [slot.tobytes() for slot in slots] == [layer.tobytes() for layer in bench.layers]
    assert feed.descriptor == -1


def test_spans_are_noted_if_they_are_asked_for() -> None:
    bench, slot = Bench(), np.zeros(NBYTES, np.uint8)
    for trace in (True, False):
        with bench.feed(trace=trace) as feed:
            for layer in range(3):
                feed.feed(layer, slot.ctypes.data, [])
            hear_all(feed, 6)
            spans = feed.take_spans()
            assert feed.take_spans() == []
        assert sorted((what, layer) for what, _, layer, _, _ in spans) == [
            (what, layer) for what in ("await_copies", "await_slot", "enqueue") for layer in range(3) if trace
        ]
        assert all(begin <= end for *_, begin, end in spans)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_a_consumer_in_cpp_goes_through_all_layers(slots: int) -> None:
    bench, seen = Bench(), list[int]()

    def work(slot: int, _slot: int, amount: int) -> int:
        content = ctypes.string_at(slot, NBYTES)
        seen.append(content[0] if content == content[:1] * NBYTES else -1)
        return int(amount == 7)

    function = KERNEL(work)
    kernel = ctypes.cast(function, ctypes.c_void_p).value
    bench.slow(0.001)
    memory = [np.zeros(NBYTES, np.uint8) for _ in range(slots)]
    with bench.feed() as feed:
        addresses = [slot.ctypes.data for slot in memory]
        for _ in range(2):
            assert bench.module.consume(feed, bench.device, addresses, 4, kernel, 7) > 0
    assert seen == 8 * [1, 2, 3]
