"""The whole model at once, or an error."""

from __future__ import annotations

from asyncload.errors import AsyncloadError, PlanError, SourceChangedError
from asyncload.loader._session import Request, Session
from asyncload.model import Model, Partial
from asyncload.pipeline import Engine

__all__ = ["load_model"]


async def load_model(engine: Engine, request: Request, resume: Partial | None = None) -> Model:
    """Loads a model; whatever was allocated is free again when this raises, but for what an error's partial owns."""
    session = Session(engine, request)
    begun = False
    try:
        async with session.opened:
            await session.open()
            if resume is not None:
                _take_over(session, resume)
            await session.allocate(range(len(session.plan.tensors)))
            session.begin()
            begun = True
            await session.transfer.run()
            stats = session.transfer.stats.result()
            await engine.readers.run(session.finish)
        session.meter.done()
        return Model(session.tensors, header=session.opened.header, device=engine.device.info, stats=stats)
    except BaseException as error:
        if begun:
            session.meter.failed(error)
        resumable = begun and isinstance(error, AsyncloadError)
        try:
            await session.discard(keep=session.landed_tensors if resumable else ())
        except BaseException:  # cancelled meanwhile: then nothing stays
            await session.discard()
            raise
        if resumable and isinstance(error, AsyncloadError):
            error.partial = _partial(session)
            error.add_note(
                f"{len(error.partial.names)} of {len(session.plan.tensors)} tensors had arrived; "
                "load(..., resume=error.partial) goes on from there, error.partial.close() frees them"
            )
        raise


def _partial(session: Session) -> Partial:
    arrived = [session.hand_out(index) for index in sorted(session.memory)]
    return Partial(
        {tensor.name: tensor for tensor in arrived},
        identity=session.opened.identity,
        device=session.engine.device.info,
    )


def _take_over(session: Session, partial: Partial) -> None:
    """Makes what has arrived before part of this load."""
    if partial.identity != session.opened.identity:
        raise SourceChangedError(
            f"{session.opened.name}: not the file that the partial load read", url=session.opened.name
        )
    if partial.device != session.engine.device.info:
        raise PlanError(f"the partial load is on {partial.device.name}, not on {session.engine.device.info.name}")
    indices = {tensor.info.name: index for index, tensor in enumerate(session.plan.tensors)}
    for name, tensor in partial.tensors.items():
        if name not in indices:
            continue
        planned, borrowed = session.plan.tensors[indices[name]], session.memory.get(indices[name])
        if (planned.dtype, planned.shape) != (tensor.dtype, tensor.shape):
            raise PlanError(f"{name} arrived as {tensor.dtype}, and is now asked for as {planned.dtype}")
        if borrowed is not None and borrowed.address != tensor.address:
            raise PlanError(f"{name} arrived elsewhere than in the buffer that is now given for it")
    for name, tensor in partial.take().items():
        if name in indices:
            session.memory[indices[name]] = tensor.memory
            session.landed_tensors.add(indices[name])
        tensor.close()
