"""One load from its opening to its end: sources, plan, targets, progress; undone unless it completes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from asyncload.device import DeviceMemory
from asyncload.errors import DeviceError, TensorNotFoundError
from asyncload.interpreter_lock import UNHURRIED, Pause
from asyncload.loader._kernels import prepare_kernels
from asyncload.loader._open import ModelPath, OpenedModel
from asyncload.memory import Allocation, Purpose
from asyncload.model import Memory, Target, Tensor, borrow, check_disjoint, check_target
from asyncload.options import DecodeOption
from asyncload.pipeline import Backend, Engine, Hears, NativeBackend, Sink, Transfer
from asyncload.plan import DtypeSpec, LoadPlan, Selection, plan_load
from asyncload.quant.cuda import ALIGNMENT
from asyncload.telemetry import ProgressCallback, ProgressMeter

__all__ = ["Request", "Session"]


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

    hears: Hears = "end"
    plan: LoadPlan
    backend: Backend
    meter: ProgressMeter

    def __init__(self, engine: Engine, request: Request) -> None:
        self.engine = engine
        self.request = request
        options = engine.options
        self.opened = OpenedModel(engine.callers.run, strict=options.strict, native=options.engine == "native")
        self.memory: dict[int, Memory] = {}  # by the tensor's index in the plan, until it is handed out
        self.landed_tensors: set[int] = set()
        self._made: dict[str, Tensor] = {}  # of all memory, while it is written to
        self.tensors: dict[str, Tensor] = {}  # that are complete
        self.transfer: Transfer | None = None

    def make_plan(self) -> None:
        """Makes the plan of what was opened, its kernels and its borrowed targets; nothing has moved then. Blocks."""
        self.opened.pause()
        into = self.request.into or {}
        if into:
            self.engine.device.attach()
        targets: dict[str, Target] = {}
        for name, buffer in into.items():
            targets[name] = borrow(buffer, tensor_name=name)
            self.opened.pause()
        unaligned = {name for name, target in targets.items() if target.address % ALIGNMENT}
        self.backend = self.engine.backend(self.opened.sources)
        self.plan = self._plan(self.engine.options.decode, unaligned)
        self.plan.check_sources([source.size for source in self.opened.sources])
        if not prepare_kernels(self.engine, self.plan.kernels):
            self.plan = self._plan("host", unaligned)
            prepare_kernels(self.engine, self.plan.kernels)
        if targets:
            self._take_targets(targets)

    def make_transfer(self) -> None:
        """Makes the transfer of what is not there yet; blocks."""
        self.opened.pause()
        there = [self.plan.tensors[index] for index in self.landed_tensors]
        self.meter = ProgressMeter(
            self.opened.name,
            nbytes=self.plan.device_nbytes,
            tensors=len(self.plan.tensors),
            callback=self.request.progress,
            resumed=(sum(tensor.nbytes for tensor in there), len(there)),
        )
        self.hears = "chunk" if self.meter.listens else self.hears
        self.transfer = self.backend.transfer(self.plan, self.opened.sources, self, skip=self.landed_tensors)
        self.transfer.prepare()
        if isinstance(self.backend, NativeBackend):
            self.opened.hand_over()

    def begin(self) -> None:
        """Allocates device memory for the tensors that have none, which may be moved as they get it; blocks.

        It makes the tensors, too, of which there is nothing left to do at the end.
        """
        assert self.transfer is not None
        self.opened.pause()
        everything = range(len(self.plan.tensors))
        missing = [index for index in everything if index not in self.memory]
        pause = self.opened.pause
        if missing and (recipient := self.transfer.recipient(missing)) is not None:
            pause = Pause(UNHURRIED)  # the first bytes are on their way

            def keep(position: int, allocation: Allocation) -> None:
                self.memory[missing[position]] = allocation
                pause()

            self.engine.tracker.allocate_some(self._sizes(missing), Purpose.WEIGHTS, recipient, keep)
        self.allocate(everything)
        self.transfer.admit()
        self._made = self._make_tensors(everything, pause)

    async def run(self) -> None:
        """Moves what is to be moved."""
        assert self.transfer is not None
        self.meter.start()
        await self.transfer.run()

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

    def allocate(self, tensors: Collection[int]) -> None:
        """Allocates device memory for those of the tensors that have none; blocks."""
        missing = [index for index in tensors if index not in self.memory]
        if not missing:  # a call of the driver's gives the interpreter lock up
            return
        allocations = self.engine.tracker.allocate_all(self._sizes(missing), Purpose.WEIGHTS)
        self.memory.update(zip(missing, allocations, strict=True))

    def _sizes(self, tensors: Collection[int]) -> dict[str, int]:
        return {self.plan.tensors[index].info.name: self.plan.tensors[index].nbytes for index in tensors}

    def hand_out(self, index: int) -> Tensor:
        """Makes a tensor of a complete target, which is the tensor's from now on."""
        tensor = self._make_tensor(index)
        del self.memory[index]
        return tensor

    def _make_tensor(self, index: int) -> Tensor:
        tensor = self.plan.tensors[index]
        return Tensor(
            name=tensor.info.name,
            shape=tensor.shape,
            dtype=tensor.dtype,
            type=tensor.info.type,
            device=self.engine.device.info,
            memory=self.memory[index],
            logical_shape=tensor.info.shape,
        )

    def _make_tensors(self, indices: Iterable[int], pause: Pause) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for index in indices:
            tensor = self._make_tensor(index)
            tensors[tensor.name] = tensor
            pause()
        return tensors

    def finish(self) -> None:
        """Has all tensors ready, which are complete."""
        self.tensors, self._made = self._made, {}
        self.memory.clear()

    async def discard(self, *, keep_landed: bool = False) -> None:
        """Frees the targets that were not handed out, and waits until that is done.

        What has landed is made into tensors instead where it is to be kept. An error of the device in this is the
        tracker's to log: what ended the load is what counts.
        """
        try:
            if self.transfer is not None:
                await self.transfer.end()
        finally:
            with suppress(DeviceError):
                await self.engine.callers.run(self._discard, keep_landed)

    def _discard(self, keep_landed: bool) -> None:
        self._made = {}
        tensors, self.tensors = self.tensors, {}
        for tensor in tensors.values():
            tensor.close()
        for index in [index for index in self.memory if not (keep_landed and index in self.landed_tensors)]:
            memory = self.memory.pop(index)
            if isinstance(memory, Allocation):
                memory.close()
        self.tensors = self._make_tensors(sorted(self.memory), Pause())
        self.memory.clear()
        self.engine.tracker.flush()

    # What the transfer asks

    def target(self, tensor: int) -> DeviceMemory:
        """Where a tensor goes."""
        memory = self.memory[tensor]
        return DeviceMemory(memory.address, memory.nbytes)

    def landed(self, tensors: Sequence[int]) -> None:
        """Keeps account of complete tensors."""
        self.landed_tensors.update(tensors)
        self.meter.tensors(len(tensors))

    def moved(self, nbytes: int) -> None:
        """Reports progress."""
        self.meter.chunk(nbytes)
