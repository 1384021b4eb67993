"""The whole model at once, or an error."""

from __future__ import annotations

from functools import partial

from asyncload.errors import AsyncloadError, PlanError, SourceChangedError
from asyncload.loader._session import Request, Session
from asyncload.model import Model, Partial, Tensor
from asyncload.pipeline import Engine

__all__ = ["load_model"]


async def load_model(engine: Engine, request: Request, resume: Partial | None = None) -> Model:
    """Loads a model; whatever was allocated is free again when this raises, but for what an error's partial owns."""
    session = Session(engine, request)
    begun = False
    try:
        async with session.opened:
            await session.opened.open(request.path, partial(_prepare, session, resume))
            begun = True
            await session.run()
            assert session.transfer is not None
            stats = session.transfer.stats()
            await session.transfer.end()
            session.finish()
        session.meter.done()
        tensors, session.tensors = session.tensors, {}  # the model's alone from here on
        return Model(tensors, header=session.opened.header, device=engine.device.info, stats=stats)
    except BaseException as error:
        if begun:
            session.meter.failed(error)
        resumable = begun and isinstance(error, AsyncloadError)
        try:
            await session.discard(keep_landed=resumable)
        except BaseException:  # cancelled meanwhile: then nothing stays
            await session.discard()
            raise
        if resumable and isinstance(error, AsyncloadError):
            tensors, session.tensors = session.tensors, {}
            error.partial = Partial(tensors, identity=session.opened.identity, device=engine.device.info)
            error.add_note(
                f"{len(tensors)} of {len(session.plan.tensors)} tensors had arrived; "
                "load(..., resume=error.partial) goes on from there, error.partial.close() frees them"
            )
        raise


def _prepare(session: Session, resume: Partial | None) -> None:
    """All that comes before the event loop has something to wait for, in one go on one thread.

    The first bytes are on their way while the memory of the rest is allocated.
    """
    session.make_plan()
    if resume is not None:
        arrived = _check(session, resume)
        session.allocate([index for index in range(len(session.plan.tensors)) if index not in arrived])
        _take_over(session, resume, arrived)
    session.make_transfer()
    session.begin()


def _check(session: Session, partial: Partial) -> dict[int, Tensor]:
    """What has arrived before and belongs to this load, by index; raises if the two do not go together."""
    if partial.identity != session.opened.identity:
        raise SourceChangedError(
            f"{session.opened.name}: not the file that the partial load read", url=session.opened.name
        )
    if partial.device != session.engine.device.info:
        raise PlanError(f"the partial load is on {partial.device.name}, not on {session.engine.device.info.name}")
    tensors = partial.tensors
    arrived: dict[int, Tensor] = {}
    for index, planned in enumerate(session.plan.tensors):
        tensor = tensors.get(planned.info.name)
        if tensor is None:
            continue
        if (planned.dtype, planned.shape) != (tensor.dtype, tensor.shape):
            raise PlanError(f"{tensor.name} arrived as {tensor.dtype}, and is now asked for as {planned.dtype}")
        borrowed = session.memory.get(index)
        if borrowed is not None and tensor.nbytes and borrowed.address != tensor.address:
            raise PlanError(f"{tensor.name} arrived elsewhere than in the buffer that is now given for it")
        arrived[index] = tensor
    _check_apart(session, arrived)
    return arrived


def _check_apart(session: Session, arrived: dict[int, Tensor]) -> None:
    """A buffer that the caller gives now must not lie over a tensor that has arrived."""
    for index, target in session.memory.items():
        for other, tensor in arrived.items():
            if (
                index != other
                and target.address < tensor.address + tensor.nbytes
                and tensor.address < (target.address + target.nbytes)
            ):
                name = session.plan.tensors[index].info.name
                raise PlanError(f"the buffer given for {name} lies over {tensor.name}, which has arrived")


def _take_over(session: Session, partial: Partial, arrived: dict[int, Tensor]) -> None:
    """Makes what has arrived part of this load, and frees the rest of the partial one."""
    for index, tensor in arrived.items():
        session.memory[index] = tensor.memory
        session.landed_tensors.add(index)
    for tensor in partial.take().values():
        tensor.close()
