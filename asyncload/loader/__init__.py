"""The front door: everything put together."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Generator, Iterable, Mapping
from contextlib import asynccontextmanager, contextmanager
from types import TracebackType
from typing import Any, Literal, Self

import anyio

from asyncload.device import Device, default_device, open_device
from asyncload.errors import ClosedError, OptionsError
from asyncload.gguf import Header
from asyncload.interpreter_lock import waiting
from asyncload.loader._kernels import prepare_kernels
from asyncload.loader._layer_stream import LayerRide, LayerStream, StreamRequest
from asyncload.loader._model_load import load_model
from asyncload.loader._open import ModelPath, OpenedModel
from asyncload.loader._session import Request
from asyncload.loader._tensor_stream import TensorStream
from asyncload.memory import VramTracker
from asyncload.model import Model, Partial
from asyncload.options import Options
from asyncload.pipeline import Engine
from asyncload.plan import DtypeSpec, Mode, Selection, all_kernels
from asyncload.telemetry import ProgressCallback, ending
from asyncload.threads import run_in_thread, settle

__all__ = ["LayerRide", "LayerStream", "Loader", "TensorStream", "load", "read_header", "stream"]


async def read_header(path: ModelPath, *, strict: bool = False) -> Header:
    """Reads the header of a GGUF file, or of all parts of a split one.

    Its tensors carry name, type, shape, offset in the file and size in bytes. ``strict`` accepts only what ggml does.
    Raises ``SourceError`` and ``FormatError``.
    """
    with waiting():
        async with OpenedModel(run_in_thread, strict=strict) as opened:
            await opened.open(path)
            return opened.header


async def load(
    path: ModelPath, *, device: str | Device | None = None, options: Options | None = None, **request: Any
) -> Model:
    """Loads one model with a loader of its own; the model outlives it.

    ``device`` and ``options`` as for ``Loader``, everything else as for ``Loader.load``.
    """
    async with Loader(device, options=options) as loader:
        return await loader.load(path, **request)


@asynccontextmanager
async def stream(
    path: ModelPath, *, device: str | Device | None = None, options: Options | None = None, **request: Any
) -> AsyncGenerator[LayerStream]:
    """Streams one model's layers with a loader of its own: ``async with asyncload.stream(path) as layers: ...``.

    ``device`` and ``options`` as for ``Loader``, everything else as for ``Loader.stream``.
    """
    async with Loader(device, options=options) as loader, loader.stream(path, **request) as layers:
        yield layers


class Loader:
    """Loads models into one device; an async context manager that owns device, staging memory, threads and streams.

    ``device`` is ``"cuda:N"``, ``"host"``, an opened device (which is closed with the loader), or None for the first
    CUDA device or, where there is none, host memory. Any number of loads may run at once and share the staging budget.
    Leaving the block while loads run ends them with ``ClosedError``. It may be entered in one task and left in another.
    """

    def __init__(self, device: str | Device | None = None, *, options: Options | None = None) -> None:
        self._wanted = device
        self._options = options or Options()
        self._engine: Engine | None = None
        self._closing = False
        self._running: dict[anyio.CancelScope, int] = {}  # with the task that each is in
        self._idle: anyio.Event

    async def __aenter__(self) -> Self:
        """Opens the device and what it needs. Raises ``DeviceError``."""
        if self._engine is not None or self._closing:
            raise ClosedError("a loader is entered once")
        try:
            await run_in_thread(self._open)
        except BaseException:
            await self._close()
            raise
        return self

    def _open(self) -> None:
        device = self._wanted
        if device is None or isinstance(device, str):
            device = open_device(device or default_device())
        self._engine = Engine(device, self._options)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the loads that still run, and all threads; models and tensors stay valid."""
        await self._close()

    async def _close(self) -> None:
        if anyio.get_current_task().id in self._running.values():
            raise ClosedError("a loader cannot be closed in a task that still iterates over one of its streams")
        self._closing = True
        self._idle = anyio.Event()
        try:
            if self._running:
                for scope in self._running:
                    scope.cancel()
                await settle(self._idle)
        finally:
            engine, self._engine = self._engine, None
            if engine is not None:
                await run_in_thread(engine.close)

    @contextmanager
    def _load_scope(self) -> Generator[Engine]:
        """Counts a load as running, so that closing the loader ends it and waits for it."""
        if self._engine is None or self._closing:
            raise ClosedError("a loader is used inside its `async with` block")
        scope = anyio.CancelScope()
        self._running[scope] = anyio.get_current_task().id
        try:
            with scope:
                yield self._engine
        finally:
            del self._running[scope]
            if self._closing and not self._running:
                self._idle.set()
        if scope.cancelled_caught:
            raise ClosedError("the loader was closed while it loaded")

    @property
    def device(self) -> Device:
        """The device; inside the ``async with`` block."""
        return self._active().device

    @property
    def tracker(self) -> VramTracker:
        """The ledger of the device memory that this loader's tensors take; inside the ``async with`` block."""
        return self._active().tracker

    def _active(self) -> Engine:
        if self._engine is None:
            raise ClosedError("a loader is used inside its `async with` block")
        return self._engine

    async def warm_up(self, dtypes: Iterable[str] = ("float32", "float16", "bfloat16")) -> None:
        """Makes the kernels ready that loads to these dtypes need, so that none of them compiles.

        The host's are not among them where the device decodes, though it needs one for a buffer of the caller's to
        which the device cannot decode. Takes seconds to a minute where kernels are not in the caches on disk, and some
        tenths where they are; the event loop goes on meanwhile. Raises ``OptionsError`` for an unknown dtype,
        ``BackendUnavailableError`` where decoding on the device was asked for and its compiler is missing.
        """
        with self._load_scope() as engine:
            decode, device = engine.options.decode, engine.device.info.kind
            dtypes = list(dtypes)
            if not await engine.callers.run(
                prepare_kernels, engine, all_kernels(dtypes, decode=decode, device=device).__getitem__
            ):
                await engine.callers.run(
                    prepare_kernels, engine, all_kernels(dtypes, decode="host", device=device).__getitem__
                )

    async def load(
        self,
        path: ModelPath,
        *,
        dtype: DtypeSpec = "packed",
        select: Selection = None,
        into: Mapping[str, Any] | None = None,
        progress: ProgressCallback | None = None,
        resume: Partial | None = None,
    ) -> Model:
        """Loads a model, whole or not at all.

        ``path``: a GGUF file, any part of a split one, or a ``Source``. ``dtype``: ``"packed"`` for the blocks as they
        are (quantized tensors as bytes), or ``"float32"``, ``"float16"``, ``"bfloat16"``, or a mapping from names or
        globs to these; integer tensors keep their type. ``select``: names, globs and layer numbers. ``into``: the
        caller's own buffers by name (contiguous, of the tensor's shape and dtype, on this device); tensors without one
        are allocated. ``progress``: called on the event loop's thread with a ``Progress`` as chunks arrive, or a
        ``ProgressStream``; chunks that come faster than the loop turns are told together. ``resume``: the ``partial``
        of an error, whose tensors are not moved again.

        Raises ``SourceError``, ``FormatError``, ``PlanError`` (nothing has moved) and ``DeviceError``. When it raises
        or is cancelled, no copy is under way any more and device memory is as before, but for an error's ``partial``.
        """
        with waiting(), ending(progress), self._load_scope() as engine:
            request = Request(path=path, dtype=dtype, select=select, into=into, progress=progress)
            return await load_model(engine, request, resume)
        raise AssertionError("the scope raises when it swallows a cancellation")

    def stream(
        self,
        path: ModelPath,
        *,
        dtype: DtypeSpec = "packed",
        slots: int = 2,
        allow: Collection[Mode] = ("full", "hybrid", "stream"),
        free: int | None = None,
        host: Literal["auto", "slabs", "file"] = "auto",
        trace: bool = False,
        **memory: Any,
    ) -> LayerStream:
        """Runs a model that may be larger than the device: ``async with loader.stream(path) as layers: ...``.

        ``async for layer in layers`` gives each layer once, in order; inside of ``with layer.on(stream)`` its tensors
        are there. Which layers stay on the device and which pass through ``slots`` slots is what ``plan_memory`` says
        of ``free`` bytes (None: what is free now) and the modes in ``allow``; ``memory`` are further arguments of it
        (``context``, ``kv_type``, ``kv_bytes``, ``workspace``, ``batch``, ``margin``, ``prefill_cache``). ``host``:
        layers that stream are kept in pinned host memory (``"slabs"``), or read from the file in each sweep
        (``"file"``), or the former where that takes no more than half of what can be had (``"auto"``). ``trace`` has
        ``last_pass`` say what the loader's threads did, too.

        Entering the block raises ``DoesNotFitError`` where no mode fits, and what ``load`` raises; the iteration what
        fetching a layer raises.
        """
        request = StreamRequest(
            path=path,
            dtype=dtype,
            free=free,
            host=host,
            trace=trace,
            memory={"slots": slots, "allow": allow, **memory},
        )
        return LayerStream(self._load_scope(), request)

    def tensors(
        self,
        path: ModelPath,
        *,
        ahead: int = 256 << 20,
        dtype: DtypeSpec = "packed",
        select: Selection = None,
        progress: ProgressCallback | None = None,
    ) -> TensorStream:
        """Loads tensor by tensor: ``async with loader.tensors(path) as tensors: async for tensor in tensors: ...``.

        ``ahead`` (bytes) bounds what has landed, or is on its way, and was not yet taken. Everything else as for
        ``load``. Raises ``OptionsError`` for an ``ahead`` below 1; what ``load`` raises comes from entering the block
        or from the iteration.
        """
        if ahead < 1:
            raise OptionsError(f"ahead is {ahead}, at least 1 byte is needed", option="ahead")
        return TensorStream(
            self._load_scope(), Request(path=path, dtype=dtype, select=select, progress=progress), ahead
        )
