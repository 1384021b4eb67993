"""Text by Gemma 3, computed with torch from weights of which only a few layers need be on the device at a time.

``python -m examples.generate --prompt "The capital of France is" --tokens 20 --device host --mode stream``
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, TypeVar

import anyio
import torch
from anyio import to_thread

from asyncload import Loader, Tensor, read_header
from asyncload.errors import AsyncloadError
from asyncload.layers import Layer
from asyncload.loader import LayerStream
from asyncload.memory import Purpose
from asyncload.options import format_size, parse_size
from asyncload.plan import Plan
from bench._demo_model import DemoError, fetch
from examples.gemma3 import Config, KVCache, Weights, embed, predict, run_layer
from examples.tokenizer import Tokenizer

__all__ = ["Session", "main", "open_session"]

T = TypeVar("T")

_DTYPES: Final = {"f32": torch.float32, "bf16": torch.bfloat16}
_MODES: Final = ("full", "hybrid", "stream")


@asynccontextmanager
async def open_session(
    loader: Loader, path: Path, *, context: int, dtype: str = "f32", batch: int = 512, **request: Any
) -> AsyncGenerator[Session]:
    """A model that is ready for a sequence of ``context`` tokens, up to ``batch`` of which pass a layer at once.

    ``dtype`` is that of the matrices and of the cache, ``"f32"`` or ``"bf16"``; ``request`` goes to ``Loader.stream``.
    Raises what that raises, and ``ValueError`` for a model that is no Gemma 3.
    """
    dtypes = {"*_norm.weight": "f32", "*": dtype}  # norms are few, and float32 in the file
    async with loader.stream(path, dtype=dtypes, context=context, batch=batch, kv_type=dtype, **request) as layers:
        make = partial(Session, loader, layers, context=context, dtype=_DTYPES[dtype], batch=batch)
        session = await to_thread.run_sync(make)
        memory = session.cache.memory
        with loader.tracker.register(memory.data_ptr(), memory.nbytes, Purpose.KV_CACHE, "KV cache"):
            yield session


class Session:
    """A model, and the one sequence that it has read so far; made by ``open_session``."""

    def __init__(self, loader: Loader, layers: LayerStream, *, context: int, dtype: torch.dtype, batch: int) -> None:
        info = loader.device.info
        self._device = torch.device("cpu" if info.kind == "host" else f"cuda:{info.index}")
        self._stream = None if info.kind == "host" else torch.cuda.Stream(self._device)
        self._layers = layers
        self._batch = batch
        self._config = Config.of(layers.header)
        self._outer = _weights({name: layers.resident[name] for name in ("token_embd.weight", "output_norm.weight")})
        self.cache = KVCache(self._config, context=context, batch=batch, dtype=dtype, device=self._device)

    @property
    def plan(self) -> Plan:
        """What of the model is where."""
        return self._layers.plan

    async def read(self, tokens: Sequence[int]) -> torch.Tensor:
        """Reads further tokens of the sequence; returns what the last layer gives for each, for ``predict``.

        Each batch takes one pass over all layers. The result, (tokens, width), is computed on the session's stream, and
        only there it may be used. Raises ``ValueError`` where the context is full. A pass that is cut
        short ends the sequence: some layers have its keys and values then, and others not.
        """
        if self.cache.length + len(tokens) > self.plan.context:
            raise ValueError(f"{self.cache.length + len(tokens)} tokens are more than the context, {self.plan.context}")
        passes = [await self._pass(tokens[at : at + self._batch]) for at in range(0, len(tokens), self._batch)]
        return await self._compute(torch.cat, passes)

    async def _pass(self, tokens: Sequence[int]) -> torch.Tensor:
        hidden = await self._compute(self._embed, tokens)
        async for layer in self._layers:
            with layer.on(self._stream):
                hidden = await self._compute(self._run_layer, layer, hidden)
        self.cache.length += len(tokens)
        return hidden

    async def predict(self, hidden: torch.Tensor, at: Sequence[int] = (-1,)) -> torch.Tensor:
        """The logits of what follows the tokens at some places in ``hidden``, on the host: (places, vocabulary)."""
        return await self._compute(self._predict, hidden, list(at))

    async def generate(self, prompt: Sequence[int], count: int) -> AsyncGenerator[int]:
        """The ``count`` tokens that follow a prompt, the likeliest one each time."""
        tokens = prompt
        for _ in range(count):
            hidden = await self.read(tokens)
            token = int((await self.predict(hidden)).argmax())
            yield token
            tokens = [token]

    # On threads, so that the event loop goes on

    async def _compute(self, function: Callable[..., T], *arguments: Any) -> T:
        def run() -> T:
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                return function(*arguments)

        return await to_thread.run_sync(run)

    def _embed(self, tokens: Sequence[int]) -> torch.Tensor:
        return embed(self._config, self._outer, torch.tensor(tokens, device=self._device))

    def _predict(self, hidden: torch.Tensor, at: list[int]) -> torch.Tensor:
        return predict(self._config, self._outer, hidden[at]).cpu()

    def _run_layer(self, layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
        return run_layer(self._config, layer.number, _weights(layer), hidden, self.cache)


def _weights(tensors: Mapping[str, Tensor]) -> Weights:
    """Torch's views of tensors; nothing is copied."""
    return {name: torch.from_dlpack(tensor) for name, tensor in tensors.items()}


# --- the command -----------------------------------------------------------------------------------------------------


async def _show(arguments: argparse.Namespace) -> None:
    """Writes the text as it comes, then what it took."""
    path: Path = arguments.file or await to_thread.run_sync(fetch)
    tokenizer = await to_thread.run_sync(Tokenizer, await read_header(path))
    prompt = tokenizer.encode(arguments.prompt)
    request: dict[str, Any] = {"allow": [arguments.mode] if arguments.mode else _MODES, "slots": arguments.slots}
    async with (
        Loader(arguments.device) as loader,
        open_session(
            loader,
            path,
            context=len(prompt) + arguments.tokens,
            dtype=arguments.dtype,
            free=arguments.free,
            **request,
        ) as session,
        aclosing(session.generate(prompt, arguments.tokens)) as generated,
    ):
        _write(arguments.prompt.encode())
        times = [time.perf_counter()]
        async for token in generated:
            times.append(time.perf_counter())
            if token == tokenizer.end:
                break
            _write(tokenizer.to_bytes(token))
        _write(b"\n")
        print(_summary(session.plan, [after - before for before, after in pairwise(times)]), file=sys.stderr)
        print(loader.tracker.report(), file=sys.stderr)


def _write(text: bytes) -> None:
    """A token may end within a character, so what is written are bytes."""
    sys.stdout.buffer.write(text)
    sys.stdout.flush()


def _summary(plan: Plan, seconds: Sequence[float]) -> str:
    first, *others = seconds
    text = f"mode {plan.mode}: {len(plan.resident)} of {len(plan.layers)} layers stay on the device"
    if plan.streamed:
        text += f", the others pass through {plan.slots} slots of {format_size(plan.slot_nbytes)}"
        text += f"; {format_size(plan.sweep_nbytes)} are copied in each pass"
    text += f"\nthe first token took {first:.3f} s"
    if others:
        text += f", each of the other {len(others)} {sum(others) / len(others):.3f} s"
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.generate", description="Text by a Gemma 3 whose layers stream."
    )
    parser.add_argument("--prompt", default="The capital of France is", help="the text to be continued")
    parser.add_argument("--tokens", type=int, default=20, metavar="N", help="how many follow it at most (20)")
    parser.add_argument("--device", metavar="NAME", help="host or cuda:N (default: the first GPU, else host)")
    parser.add_argument("--mode", choices=_MODES, help="where the layers are (default: the fastest way that fits)")
    parser.add_argument("--free", type=parse_size, metavar="SIZE", help="what of the device may be used (what is free)")
    parser.add_argument("--slots", type=int, default=2, metavar="N", help="slots that layers pass through (2)")
    parser.add_argument("--dtype", choices=_DTYPES, default="f32", help="of the matrices and the cache (f32)")
    parser.add_argument("--file", type=Path, help="another Gemma 3 than the demo's")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.tokens < 1:
        parser.error("--tokens: at least 1")
    try:
        anyio.run(_show, arguments)
    except (AsyncloadError, DemoError, ValueError) as error:
        print(f"generate: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
