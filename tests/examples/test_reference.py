"""The example against llama.cpp, on the demo's model: logits and tokens, with all layers streamed.

The reference (``make_reference.py``) has two sets of logits. With the weights as float32 llama.cpp computes what the
example computes, but for GELU, which it looks up in a table of float16 numbers: they differ by 0.0085 at most, 0.002 in
the mean. With the file as it is llama.cpp rounds what goes into each product to 8 bits, and cache and attention to
float16, which moves its own logits by up to 1.06 of those kept, 0.26 in the mean; from these the example's differ by as
much. The logits lie between -20 and 34.
"""

from __future__ import annotations

from typing import Any

import pytest

from asyncload import Loader
from asyncload.threads import run_in_thread
from bench._demo_model import NAME, SHA256, cache_folder
from tests.examples.reference import REFERENCE

pytestmark = [pytest.mark.torch, pytest.mark.demo]

# By dtype of the example and set of the reference: how far logits may be apart, at most and in the mean (of squares).
# That of float32 is close enough to tell GELU from its approximation by tanh, which Gemma has.
TOLERANCES = {
    ("f32", "f32"): (0.02, 0.003),
    ("f32", "file"): (1.2, 0.35),
    ("bf16", "f32"): (0.6, 0.1),
    ("bf16", "file"): (1.4, 0.4),
}
DEVICES = ["host", pytest.param("cuda:0", marks=pytest.mark.gpu)]
SHORT, LONG = REFERENCE["prompts"]  # the second is longer than the sliding window


@pytest.fixture
def anyio_backend() -> Any:
    """Once is enough: what is computed does not depend on the loop."""
    return "asyncio", {"use_uvloop": True}


def open_session(loader: Loader, **more: Any) -> Any:
    from examples.generate import open_session  # which imports torch

    arguments: dict[str, Any] = {"context": 1024, "allow": ["stream"], **more}
    return open_session(loader, cache_folder() / NAME, **arguments)


async def room_for(loader: Loader, layers: int) -> int:
    """The bytes in which so many layers stay, beside the slots through which the others pass."""
    async with open_session(loader, batch=128) as session:
        return int(session.plan.total + layers * session.plan.slot_nbytes)


def test_the_reference_is_of_this_model() -> None:
    assert REFERENCE["model"] == {"name": NAME, "sha256": SHA256}
    assert len(LONG["ids"]) > 512 + 256
    assert max(row["position"] for row in LONG["logits"]) == len(LONG["ids"]) - 1


@pytest.mark.anyio
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("prompt", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("device", DEVICES)
async def test_logits_are_llama_cpps(device: str, prompt: Any, dtype: str) -> None:
    torch: Any = pytest.importorskip("torch")

    rows = prompt["logits"]
    async with Loader(device) as loader, open_session(loader, batch=128, dtype=dtype) as session:
        hidden = await session.read(prompt["ids"])
        logits = await session.predict(hidden, [row["position"] for row in rows])
    found = torch.cat([line[row["ids"]] for row, line in zip(rows, logits, strict=True)])
    for kind in ("f32", "file"):
        expected = torch.cat([torch.tensor(row[kind]) for row in rows])
        largest, mean = TOLERANCES[dtype, kind]
        assert found.sub(expected).abs().max() < largest
        assert found.sub(expected).square().mean().sqrt() < mean


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("prompt", "kind", "sure"),
    [(SHORT, "f32", 21), (SHORT, "file", 3), (LONG, "f32", 24), (LONG, "file", 20)],
    ids=["short-f32", "short-file", "long-f32", "long-file"],
)
@pytest.mark.parametrize("device", DEVICES)
async def test_the_likeliest_token_is_llama_cpps_where_it_is_sure(
    device: str, prompt: Any, kind: str, sure: int
) -> None:
    """Along its own continuation, wherever the first is further ahead than both can deviate."""
    greedy = prompt["greedy"][kind]
    async with Loader(device) as loader, open_session(loader) as session:
        hidden = await session.read(prompt["ids"] + greedy["ids"][:-1])
        logits = await session.predict(hidden, range(-len(greedy["ids"]), 0))
    likeliest = logits.argmax(dim=1).tolist()
    margin = 2 * TOLERANCES["f32", kind][0]
    compared = [at for at, ahead in enumerate(greedy["margins"]) if ahead > margin]
    assert len(compared) >= sure
    assert [likeliest[at] for at in compared] == [greedy["ids"][at] for at in compared]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("prompt", "modes", "sure"),
    [(SHORT, ["full", "stream", "hybrid"], 11), (LONG, ["stream"], 24)],
    ids=["short", "long"],
)
@pytest.mark.parametrize("device", DEVICES)
async def test_the_text_is_llama_cpps_whether_layers_stay_or_stream(
    device: str, prompt: Any, modes: list[str], sure: int
) -> None:
    greedy = prompt["greedy"]["f32"]
    texts: dict[str, list[int]] = {}
    async with Loader(device) as loader:
        for mode in modes:
            free = await room_for(loader, layers=5) if mode == "hybrid" else None
            async with open_session(loader, allow=[mode], free=free, margin=0, batch=128) as session:
                resident = len(session.plan.resident)
                assert resident == 18 if mode == "full" else resident == 0 if mode == "stream" else 5 <= resident < 18
                texts[mode] = [token async for token in session.generate(prompt["ids"], len(greedy["ids"]))]
            del session  # whose views keep the embedding
    assert list(texts.values()) == [texts["stream"]] * len(modes)
    # Up to the first token of which it is not sure; from there on the two may write different texts.
    margin = 2 * TOLERANCES["f32", "f32"][0]
    same = next((at for at, ahead in enumerate(greedy["margins"]) if ahead <= margin), len(greedy["ids"]))
    assert same >= sure
    assert texts["stream"][:same] == greedy["ids"][:same]


@pytest.mark.gpu
@pytest.mark.anyio
async def test_the_ledger_explains_the_memory_of_a_gpu() -> None:
    """What the driver says has been taken is what the ledger holds, and what torch took to work in."""
    torch: Any = pytest.importorskip("torch")

    for warm in (False, True):  # the first time torch loads its libraries
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        async with Loader("cuda:0") as loader, open_session(loader, slots=2) as session:
            assert len([token async for token in session.generate(SHORT["ids"], 4)]) == 4
            await run_in_thread(loader.tracker.verify_residency)
            found = await run_in_thread(loader.tracker.reconcile)
            of_torch = torch.cuda.memory_reserved() - before - session.cache.memory.nbytes
            assert not warm or abs(found.difference - of_torch) <= found.tolerance
        del session  # whose cache torch keeps until nobody has it


def test_the_command_writes_text(capsys: pytest.CaptureFixture[str]) -> None:
    from examples.generate import main

    assert main(["--device", "host", "--mode", "stream", "--tokens", "11", "--prompt", "The capital of France is"]) == 0
    written = capsys.readouterr()
    assert written.out == "The capital of France is the capital of the country of France. It is the\n"
    assert "mode stream: 0 of 18 layers stay on the device, the others pass through 2 slots" in written.err
    assert "kv_cache" in written.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--free", "1MiB"], "needed"), (["--device", "none"], "none"), (["--file", "/nowhere"], "/nowhere")],
)
def test_what_goes_wrong_is_said(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    from examples.generate import main

    assert main(["--device", "host", *arguments]) == 1
    assert message in capsys.readouterr().err
