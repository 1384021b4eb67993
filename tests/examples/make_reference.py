"""What llama.cpp says of the demo's model, written to ``reference.json`` beside this file.

In an environment of its own, with the model from `make demo`::

    pip install llama-cpp-python==0.3.36 numpy
    python tests/examples/make_reference.py ~/.cache/asyncload/gemma-3-270m-q4_k_m.gguf

There are two sets of logits. ``file`` is the file as it is: there llama.cpp quantizes what it multiplies quantized
weights with, to 8 bits, and keeps keys and values in float16. ``f32`` is the same weights, decoded to float32 by
llama.cpp's own quantizer, with a float32 cache and plain attention: the same model without these roundings.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import platform
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np

HERE: Final = Path(__file__).parent
SHORT: Final = "The capital of France is"
# A real text that is longer than the sliding window of 512 tokens.
LONG: Final = (HERE.parents[1] / "LICENSE").read_text()[:4000]
TEXTS: Final = (
    SHORT,
    "",
    " ",
    "Hello,  world!   Three spaces;\ttab,\nline\n\n\nthree lines\r\nand a DOS one ",
    "  leading and trailing  ",
    "naïve café \u2013 “quoted” … 50 € ½ ﬁ Å A\u030a",
    "日本語の文章。한국어 문장. Русский текст, العربية, हिन्दी",
    "👩‍👩‍👧 🏳️‍🌈 🇫🇷 \U0001f9ff \U00013000 \u0378 \ufeff",
    "<bos><start_of_turn>user</em><table><tr> <unused7> [multimodal] <0x41>",
    "def f(x):\n    return {'a': x ** 2}  # 3.14159e-10\n\n\n\n",
    "\x00\x01\x7f \u200b▁▁ _ ▁x",
    "antidisestablishmentarianism Donaudampfschifffahrtsgesellschaft aaaaaaaaaaaaaaaaaaaaaaaa",
    "\n" * 40 + " " * 40 + "end",
)
TOP: Final = 48
# Some tokens whose logits are kept at every position, spread over the vocabulary.
FIXED: Final = tuple(range(7, 262144, 262144 // 24))
LONG_POSITIONS: Final = (0, 100, 300, 511, 512, 513, 640, 700, 768)
GENERATED: Final = 24
_F32: Final = 0  # GGML_TYPE_F32, LLAMA_FTYPE_ALL_F32


def decode_file(path: Path, target: Path) -> None:
    """Writes the model with all weights in float32, by llama.cpp."""
    llama_cpp: Any = import_module("llama_cpp")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = _F32, True
    code = llama_cpp.llama_model_quantize(str(path).encode(), str(target).encode(), ctypes.byref(params))
    if code != 0:
        raise SystemExit(f"llama.cpp could not decode {path} ({code})")


def open_model(path: Path, **more: Any) -> Any:
    """The model for the long prompt, with all logits kept."""
    return import_module("llama_cpp").Llama(
        str(path), n_ctx=1024, n_batch=512, n_gpu_layers=0, logits_all=True, verbose=False, seed=0, **more
    )


def logits_of(model: Any, ids: list[int], positions: list[int]) -> Any:
    """The logits that follow some of the tokens, float32, (positions, vocabulary)."""
    model.reset()
    model.eval(ids)
    return model.scores[positions].copy()


def continue_greedily(model: Any, ids: list[int]) -> dict[str, Any]:
    """The likeliest tokens, and how far ahead of the second each was."""
    tokens: list[int] = []
    margins: list[float] = []
    model.reset()
    model.eval(ids)
    for _ in range(GENERATED):
        logits = model.scores[model.n_tokens - 1]
        second, first = (int(token) for token in np.argsort(logits)[-2:])
        tokens.append(first)
        margins.append(round(float(logits[first] - logits[second]), 4))
        model.eval([first])
    return {"ids": tokens, "margins": margins}


def describe(models: dict[str, Any], text: str, ids: list[int]) -> dict[str, Any]:
    """Both models' logits along a prompt, and how they continue it."""
    positions = list(range(len(ids))) if text == SHORT else [*LONG_POSITIONS, len(ids) - 1]
    logits = {kind: logits_of(model, ids, positions) for kind, model in models.items()}
    rows: list[dict[str, Any]] = []
    for index, position in enumerate(positions):
        likeliest = [token for found in logits.values() for token in np.argsort(found[index])[-TOP:].tolist()]
        kept = sorted({*likeliest, *FIXED})
        values = {kind: [round(float(found[index, token]), 4) for token in kept] for kind, found in logits.items()}
        rows.append({"position": position, "ids": kept, **values})
    return {
        "ids": ids,
        "logits": rows,
        "greedy": {kind: continue_greedily(model, ids) for kind, model in models.items()},
    }


def main(path: Path) -> None:
    """Writes the reference."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        decode_file(path, decoded := Path(folder) / "f32.gguf")
        models = {
            "file": open_model(path),
            "f32": open_model(decoded, type_k=_F32, type_v=_F32, flash_attn=False),
        }

    def tokenize(text: str) -> Any:
        return models["file"].tokenize(text.encode(), add_bos=True, special=False)

    reference = {
        "model": {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()},
        "made by": f"llama-cpp-python {import_module('llama_cpp').__version__} on {platform.machine()}",
        "tokens": [{"text": text, "ids": tokenize(text)} for text in TEXTS],
        "prompts": [describe(models, text, tokenize(text)) for text in (SHORT, LONG)],
    }
    (HERE / "reference.json").write_text(json.dumps(reference, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
