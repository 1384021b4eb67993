"""The layers of a model for programs without an event loop: what they give, to how many threads, and how that ends."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

import asyncload
from asyncload import blocking
from asyncload.device import HostDevice
from asyncload.errors import ClosedError, DoesNotFitError, PlanError, StalledError, TensorNotFoundError
from asyncload.options import EngineOption, Options
from tests.layers.models import Content, layers_only

Six = tuple[Path, Content]
ORDER = list(range(6))
PATIENCE = 20.0  # seconds; it matters only where something hangs
feeds = pytest.mark.parametrize("host", ["slabs", "file"])


@contextmanager
def opened(
    path: Path, options: Options, device: HostDevice | None = None, **more: Any
) -> Generator[blocking.LayerStream]:
    """A stream in which all layers pass through two slots, unless ``more`` says something else; it leaves nothing."""
    device = device or HostDevice(poison=True)
    arguments: dict[str, Any] = {"dtype": "f16", "allow": ["stream"], "workspace": 0, "kv_bytes": 0, **more}
    free = device.memory().free
    with blocking.stream(path, device=device, options=options, **arguments) as layers:
        yield layers
    assert device.memory().free == free


def take(layer: blocking.Layer) -> Content:
    with layer.on():
        return {tensor.name: tensor.numpy().tobytes() for tensor in layer.values()}


def sweep(layers: Iterable[blocking.Layer]) -> tuple[list[int], Content]:
    numbers: list[int] = []
    content: Content = {}
    for layer in layers:
        numbers.append(layer.number)
        content |= take(layer)
    return numbers, content


@pytest.mark.parametrize("mode", ["full", "stream"])
@feeds
def test_every_sweep_gives_every_layer(six_layers: Six, mode: str, host: str, small: Options) -> None:
    path, expected = six_layers
    with opened(path, small, allow=[mode], host=host) as layers:
        assert (layers.plan.mode, layers.host) == (mode, host)
        assert list(layers.header.layers) == ORDER
        assert layers.resident["token_embd.weight"].numpy().tobytes() == expected["token_embd.weight"]
        for _ in range(3):
            assert sweep(layers) == (ORDER, layers_only(expected))
        for layer in layers:
            assert layer.resident == (mode == "full")
            if layer.number == 2:
                break
        assert sweep(layers) == (ORDER, layers_only(expected))


def test_a_layer_is_used_once_and_inside_of_its_block(six_layers: Six, small: Options) -> None:
    with opened(six_layers[0], small) as layers:
        for layer in layers:
            with pytest.raises(ClosedError):
                layer["attn_q.weight"]
            with layer.on() as same:
                assert same is layer
                assert set(layer) == {"attn_q.weight", "ffn_down.weight"}
                assert len(layer) == 2
                with pytest.raises(TensorNotFoundError):
                    layer["output.weight"]
            with pytest.raises(ClosedError):
                len(layer)
            with pytest.raises(ClosedError), layer.on():
                pytest.fail("it was entered again")


def test_what_a_pass_took(six_layers: Six, small: Options) -> None:
    device = HostDevice()
    with opened(six_layers[0], small, device, trace=True) as layers:
        stream = device.stream()
        with pytest.raises(PlanError):
            layers.last_pass()
        for layer in layers:
            with layer.on(stream):
                stream.call(lambda: None)
        stats = layers.last_pass()
        stream.close()
        assert [timing.number for timing in stats.layers] == ORDER
        assert stats.nbytes == layers.plan.sweep_nbytes
        assert stats.threads


@pytest.mark.parametrize("rides", [2, 5])
@feeds
def test_threads_ride_together(six_layers: Six, rides: int, host: str, small: Options) -> None:
    with opened(six_layers[0], small, host=host) as layers:

        def ride(place: blocking.LayerRide) -> list[tuple[list[int], Content]]:
            with place:
                return [sweep(place) for _ in range(4)]

        with ThreadPoolExecutor(rides) as threads:
            found = [*threads.map(ride, [layers.join() for _ in range(rides)])]
        assert found == [[(ORDER, layers_only(six_layers[1]))] * 4] * rides


def test_a_thread_that_stalls_is_left_behind(six_layers: Six, small: Options) -> None:
    options = replace(small, stall_limit=0.05)
    with (
        blocking.Loader("host", options=options) as loader,
        loader.stream(six_layers[0], dtype="f16", allow=["stream"], workspace=0, kv_bytes=0) as layers,
    ):
        slow, quick = layers.join(), layers.join()
        kept = next(slow)
        assert sweep(quick) == (ORDER, layers_only(six_layers[1]))
        with pytest.raises(StalledError), kept.on():
            pytest.fail("it has no place any more")
        with pytest.raises(StalledError):
            next(slow)


@pytest.mark.parametrize("outlasts", [False, True])
def test_a_block_that_another_thread_is_in_when_the_stream_ends(
    six_layers: Six, small: Options, *, outlasts: bool
) -> None:
    """It is waited for, up to the limit, and ends well also when everything else has ended."""
    inside, stream_ended, block_ends = (threading.Event() for _ in range(3))
    device = HostDevice()

    def ride(layers: blocking.LayerStream, place: blocking.LayerRide) -> None:
        with next(place).on() as layer:
            inside.set()
            if outlasts:
                assert stream_ended.wait(PATIENCE)
            else:
                with pytest.raises(ClosedError):
                    while True:
                        layers.join().close()
            assert layer["attn_q.weight"].numpy().size
            block_ends.set()
        with pytest.raises(ClosedError):
            next(place)
        place.close()

    with ThreadPoolExecutor(1) as threads:
        options = replace(small, stall_limit=0.05 if outlasts else PATIENCE)
        with blocking.stream(six_layers[0], device=device, options=options, slots=2, allow=["stream"]) as layers:
            riding = threads.submit(ride, layers, layers.join())
            assert inside.wait(PATIENCE)
        assert block_ends.is_set() != outlasts
        stream_ended.set()
        riding.result(PATIENCE)


def test_an_error_in_the_body_ends_everything(six_layers: Six, small: Options) -> None:
    device = HostDevice()
    with pytest.raises(ZeroDivisionError), opened(six_layers[0], small, device) as layers:
        for layer in layers:
            with layer.on():
                raise ZeroDivisionError
    assert device.memory().free == device.memory().total
    with pytest.raises(ClosedError):
        next(iter(layers))
    with pytest.raises(ClosedError):
        layers.join()
    with pytest.raises(ClosedError):
        layers.last_pass()
    with pytest.raises(DoesNotFitError), opened(six_layers[0], small, device, free=1000):
        pytest.fail("it fitted")
    gc.collect()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("asyncload-layers")]


async def one_line(path: Path, options: Options) -> tuple[list[int], bytes]:
    async with asyncload.stream(path, device="host", options=options, slots=1, allow=["stream"], dtype="f16") as layers:
        numbers = [layer.number async for layer in layers]
        return numbers, layers.resident["token_embd.weight"].numpy().tobytes()


def test_one_line_has_a_loader_of_its_own(six_layers: Six, small: Options) -> None:
    assert anyio.run(one_line, six_layers[0], small) == (ORDER, six_layers[1]["token_embd.weight"])
    with asyncload.blocking.stream(six_layers[0], device="host", options=small) as layers:
        assert layers.plan.mode == "full"
        assert sweep(layers)[0] == ORDER


INTERRUPTED = """
import os, signal, sys, threading
from asyncload import blocking
from asyncload.device import HostDevice
from asyncload.options import Options
from asyncload.pipeline._native import NativeTransfer
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started deaf to it
device = HostDevice()
options = Options(engine=sys.argv[4], chunk_size=64 << 10, staging=256 << 10, threads=2)
steps = 0

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

class Watched(HostDevice):
    # Its copies are slow once the model is streamed, and one of them interrupts, or what C++ tells of them.
    def step(self):
        global steps
        if self.bandwidth:
            steps += 1
            if steps == 2 and sys.argv[2] == "waiting":
                interrupt()

    def stream(self):
        stream = super().stream()
        upload = stream.upload
        def watched(*arguments):
            self.step()
            upload(*arguments)
        stream.upload = watched
        return stream

    def from_native(self, event):
        self.step()
        return super().from_native(event)

def left():
    return [t.name for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]

device = Watched()
hear = NativeTransfer._hear

def heard(transfer):
    device.step()
    return hear(transfer)

NativeTransfer._hear = heard
try:
    with blocking.Loader(device, options=options) as loader:
        with loader.stream(
            sys.argv[1], dtype="f16", slots=1, allow=["stream"], host=sys.argv[3], workspace=0, kv_bytes=0
        ) as layers:
            whole = [layer.number for layer in layers]
            ride = layers.join()
            device.bandwidth = 1e6
            try:
                for layer in ride:
                    with layer.on():
                        if sys.argv[2] == "inside" and layer.number == 1:
                            interrupt()
            except KeyboardInterrupt:
                device.bandwidth = None
                ride.close()
                del ride
                assert [layer.number for layer in layers] == whole  # it is caught here, and the next sweep is whole
                raise
except KeyboardInterrupt:
    print("interrupted", left(), device.memory().total - device.memory().free)
    sys.exit(130)
"""


@pytest.mark.parametrize("where", ["waiting", "inside"])
@feeds
def test_an_interrupt_ends_cleanly(six_layers: Six, where: str, host: str, engine: EngineOption) -> None:
    """Ctrl-C while a layer is waited for, and while one is used: KeyboardInterrupt, and no other noise."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(INTERRUPTED), str(six_layers[0]), where, host, engine],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "interrupted [] 0\n", "")
