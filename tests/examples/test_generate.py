"""A small Gemma 3 of random weights writes the same whether its layers stay on the device or stream."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from asyncload import Loader, Options
from asyncload.errors import DoesNotFitError
from asyncload.memory import Purpose
from asyncload.testing import synthesize
from asyncload.threads import run_in_thread

pytestmark = [pytest.mark.torch, pytest.mark.anyio]

SMALL = Options(chunk_size=64 << 10, staging=512 << 10, threads=2, streams=2)
PROMPT = [(37 * number + number**2) % 1000 for number in range(50)]  # longer than the window of 16 tokens
COUNT = 12
DEVICES = ["host", pytest.param("cuda:0", marks=pytest.mark.gpu)]


@pytest.fixture
def anyio_backend() -> Any:
    """Once is enough: what is computed does not depend on the loop."""
    return "trio", {}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("model") / "gemma.gguf", preset="tiny-gemma", quant="Q4_K_M")[0]


def open_session(loader: Loader, path: Path, **more: Any) -> Any:
    from examples.generate import open_session  # which imports torch

    arguments: dict[str, Any] = {"context": 64, "batch": 20, "allow": ["stream"], "workspace": 0, **more}
    return open_session(loader, path, **arguments)


async def read(session: Any) -> Any:
    """The logits after each token of the prompt."""
    return await session.predict(await session.read(PROMPT), range(len(PROMPT)))


async def write(session: Any) -> tuple[list[int], Any]:
    """The tokens after the prompt, and the logits after each token of the prompt and of them."""
    torch: Any = pytest.importorskip("torch")

    tokens: list[int] = []
    logits = [await read(session)]
    for _ in range(COUNT):
        tokens.append(int(logits[-1][-1].argmax()))
        logits.append(await session.predict(await session.read(tokens[-1:])))
    return tokens, torch.cat(logits)


async def write_on(device: str, path: Path, mode: str, **more: Any) -> tuple[list[int], Any]:
    """The same in a mode; a hybrid keeps two layers."""
    async with Loader(device, options=SMALL) as loader:
        if mode == "hybrid":
            async with open_session(loader, path, **more) as session:
                more |= {"free": session.plan.total + 2 * session.plan.slot_nbytes, "margin": 0}
        async with open_session(loader, path, allow=[mode], **more) as session:
            resident = len(session.plan.resident)
            assert resident == 7 if mode == "full" else resident == 0 if mode == "stream" else 2 <= resident < 7
            return await write(session)


@pytest.mark.parametrize(
    ("mode", "slots", "host", "dtype"),
    [
        ("stream", 1, "slabs", "f32"),
        ("stream", 2, "slabs", "f32"),
        ("stream", 3, "slabs", "bf16"),
        ("stream", 2, "file", "f32"),
        ("hybrid", 2, "slabs", "f32"),
        ("hybrid", 2, "file", "bf16"),
    ],
)
@pytest.mark.parametrize("device", DEVICES)
async def test_streamed_layers_give_what_resident_ones_give(
    model: Path, device: str, *, mode: str, slots: int, host: str, dtype: str
) -> None:
    tokens, logits = await write_on(device, model, "full", dtype=dtype)
    assert len(set(tokens)) > 1
    assert logits.isfinite().all()
    found, streamed = await write_on(device, model, mode, slots=slots, host=host, dtype=dtype)
    assert found == tokens
    assert streamed.equal(logits)  # to the bit


@pytest.mark.parametrize("batch", [1, 7, 16, 49])
async def test_a_prompt_in_batches_gives_what_it_gives_at_once(model: Path, batch: int) -> None:
    async with Loader("host", options=SMALL) as loader:
        async with open_session(loader, model, batch=50) as session:
            whole = await read(session)
        async with open_session(loader, model, batch=batch) as session:
            cut = await read(session)
    assert cut.sub(whole).abs().max() < 1e-4 * whole.abs().max()


async def test_generating_takes_the_likeliest_token_each_time(model: Path) -> None:
    async with Loader("host", options=SMALL) as loader:
        async with open_session(loader, model) as session:
            expected, _ = await write(session)
        async with open_session(loader, model) as session:
            assert [token async for token in session.generate(PROMPT, COUNT)] == expected


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("context", [10, 64, 300])
@pytest.mark.parametrize("device", DEVICES)
async def test_the_plan_and_the_ledger_know_the_cache(model: Path, device: str, context: int, dtype: str) -> None:
    async with Loader(device, options=SMALL) as loader:
        async with open_session(loader, model, context=context, dtype=dtype) as session:
            planned, found = session.plan.breakdown, loader.tracker.by_purpose()
            assert found[Purpose.KV_CACHE] == planned["kv_cache"] == session.cache.memory.nbytes
            assert {name: size for name, size in found.items() if size > planned[name]} == {}
            if device != "host":  # where torch's memory is not of the device's own making
                await run_in_thread(loader.tracker.verify_residency)
        del session  # whose views keep the embedding
        await run_in_thread(loader.tracker.flush)
        assert loader.tracker.total == 0


async def test_a_full_context_is_refused(model: Path) -> None:
    async with Loader("host", options=SMALL) as loader, open_session(loader, model, context=52) as session:
        await session.read(PROMPT)
        with pytest.raises(ValueError, match="53 tokens are more than the context, 52"):
            await session.read([1, 2, 3])
        assert len(await session.read([1, 2])) == 2


async def test_other_models_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "llama.gguf"
    await run_in_thread(partial(synthesize, path, preset="tiny"))
    async with Loader("host", options=SMALL) as loader:
        with pytest.raises(ValueError, match="llama"):
            async with open_session(loader, path):
                pytest.fail("it is no Gemma")
        with pytest.raises(DoesNotFitError):
            async with open_session(loader, path, free=1 << 20):
                pytest.fail("it does not fit")
        await run_in_thread(loader.tracker.flush)
        assert loader.tracker.total == 0
