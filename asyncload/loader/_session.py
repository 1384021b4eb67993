"""One load from its opening to its end: sources, plan, targets, progress; undone unless it completes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from asyncload.device import DeviceMemory
from asyncload.errors import DeviceError, TensorNotFoundError
from asyncload.loader._kernels import prepare_kernels
from asyncload.loader._open import ModelPath, OpenedModel, pause
from asyncload.memory import Allocation, Purpose
from asyncload.model import Memory, Target, Tensor, borrow, check_disjoint, check_target
from asyncload.options import DecodeOption
from asyncload.pipeline import Backend, Engine, Sink, Transfer
from asyncload.plan import DtypeSpec, LoadPlan, Selection, plan_load
from asyncload.quant.cuda import ALIGNMENT
from asyncload.telemetry import ProgressCallback, ProgressMeter

__all__ = ["Request", "Session"]

# Tensors after which a loop on a thread lets others have the interpreter lock.
_PAUSE_EVERY: Final = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the caller asked for."""

    path: ModelPath
    dtype: DtypeSpec = "packed"
    select: Selection = None
    into: Mapping[str, Any] | None = None
    progress: ProgressCallback | None = None


class Session(Sink):
    """What all ways to load have in common; its blocking work runs on the engine's calling threads."""

    hears = "end"
    plan: LoadPlan
    backend: Backend
    meter: ProgressMeter
    transfer: Transfer

    def __init__(self, engine: Engine, request: Request) -> None:
        self.engine = engine
        self.request = request
        self.opened = OpenedModel(engine.callers.run, strict=engine.options.strict)
        self.memory: dict[int, Memory] = {}  # by the tensor's index in the plan, until it is handed out
        self.landed_tensors: set[int] = set()
        self.tensors: dict[str, Tensor] = {}  # once all of them are there

    async def open(self) -> None:
        """Opens the sources and makes the plan, its kernels and its borrowed targets; nothing has moved then."""
        await self.opened.open(self.request.path)
        await self.engine.callers.run(self._make_plan)

    def _make_plan(self) -> None:
        into = self.request.into or {}
        self.engine.device.attach()
        targets = {name: borrow(buffer, tensor_name=name) for name, buffer in into.items()}
        unaligned = {name for name, target in targets.items() if target.address % ALIGNMENT}
        self.backend = self.engine.backend(self.opened.sources)
        self.plan = self._plan(self.engine.options.decode, unaligned)
        self.plan.check_sources([source.size for source in self.opened.sources])
        if not prepare_kernels(self.engine, self.plan.kernels):
            self.plan = self._plan("host", unaligned)
            prepare_kernels(self.engine, self.plan.kernels)
        if targets:
            self._take_targets(targets)

    def _plan(self, decode: DecodeOption, unaligned: Collection[str]) -> LoadPlan:
        return plan_load(
            self.opened.header,
            dtype=self.request.dtype,
            select=self.request.select,
            chunk_size=self.backend.options.chunk_size,
            decode=decode,
            device=self.engine.device.info.kind,
            unaligned=unaligned,
        )

    def _take_targets(self, targets: Mapping[str, Target]) -> None:
        """Takes the caller's buffers as targets, once everything that was enqueued on them has ended."""
        indices = {tensor.info.name: index for index, tensor in enumerate(self.plan.tensors)}
        for name, target in targets.items():
            if name not in indices:
                raise TensorNotFoundError(f"into has a buffer for {name!r}, which is not among the tensors", name=name)
            tensor = self.plan.tensors[indices[name]]
            check_target(target, tensor.shape, tensor.dtype, self.engine.device.info, name)
            self.memory[indices[name]] = target
        check_disjoint(targets)
        self.engine.device.barrier().synchronize()

    def begin(self) -> None:
        """Makes the transfer of what is not there yet; on the loop."""
        there = [self.plan.tensors[index] for index in self.landed_tensors]
        self.transfer = self.backend.transfer(self.plan, self.opened.sources, self, skip=self.landed_tensors)
        self.meter = ProgressMeter(
            self.opened.name,
            nbytes=self.plan.device_nbytes,
            tensors=len(self.plan.tensors),
            callback=self.request.progress,
            resumed=(sum(tensor.nbytes for tensor in there), len(there)),
        )
        self.hears = "chunk" if self.meter.listens else self.hears
        self.meter.start()

    async def allocate(self, tensors: Collection[int]) -> None:
        """Allocates device memory for those of the tensors that have none."""
        await self.engine.callers.run(self._allocate, tensors)

    def _allocate(self, tensors: Collection[int]) -> None:
        for index in tensors:
            if index not in self.memory:
                tensor = self.plan.tensors[index]
                self.memory[index] = self.engine.tracker.allocate(tensor.nbytes, Purpose.WEIGHTS, tensor.info.name)

    def hand_out(self, index: int) -> Tensor:
        """Makes a tensor of a complete target, which is the tensor's from now on."""
        tensor = self.plan.tensors[index]
        return Tensor(
            name=tensor.info.name,
            shape=tensor.shape,
            dtype=tensor.dtype,
            type=tensor.info.type,
            device=self.engine.device.info,
            memory=self.memory.pop(index),
            logical_shape=tensor.info.shape,
        )

    async def finish(self) -> None:
        """Makes tensors of all targets."""
        await self.engine.callers.run(self._hand_out_all)

    def _hand_out_all(self) -> None:
        for count, index in enumerate(sorted(self.memory)):
            tensor = self.hand_out(index)
            self.tensors[tensor.name] = tensor
            if count % _PAUSE_EVERY == 0:
                pause()

    async def discard(self, *, keep_landed: bool = False) -> None:
        """Frees the targets that were not handed out, and waits until that is done.

        What has landed is made into tensors instead where it is to be kept. An error of the device in this is the
        tracker's to log: what ended the load is what counts.
        """
        with suppress(DeviceError):
            await self.engine.callers.run(self._discard, keep_landed)

    def _discard(self, keep_landed: bool) -> None:
        tensors, self.tensors = self.tensors, {}
        for tensor in tensors.values():
            tensor.close()
        for index in [index for index in self.memory if not (keep_landed and index in self.landed_tensors)]:
            memory = self.memory.pop(index)
            if isinstance(memory, Allocation):
                memory.close()
        self._hand_out_all()
        self.engine.tracker.flush()

    # What the transfer asks

    def target(self, tensor: int) -> DeviceMemory:
        """Where a tensor goes."""
        memory = self.memory[tensor]
        return DeviceMemory(memory.address, memory.nbytes)

    def landed(self, tensor: int) -> None:
        """Keeps account of complete tensors."""
        self.landed_tensors.add(tensor)
        self.meter.tensor()

    def moved(self, nbytes: int) -> None:
        """Reports progress."""
        self.meter.chunk(nbytes)
