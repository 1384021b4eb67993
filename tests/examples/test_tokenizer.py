"""The tokenizer of the example: a small vocabulary by hand, and the demo's model against llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest

from asyncload import read_header
from asyncload.gguf import ValueType
from asyncload.testing import Typed, write_gguf
from bench._demo_model import NAME, cache_folder
from examples.tokenizer import Tokenizer
from tests.examples.reference import REFERENCE

NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6
PLAIN = ["a", "b", "c", "▁", "ab", "bc", "▁a", "é"]
SCORES = [-9.0, -9.0, -9.0, -9.0, -2.0, -1.0, -2.0, -9.0]
SPECIAL = [("<bos>", CONTROL), ("<eos>", CONTROL), ("\n", USER_DEFINED), ("\n\n", USER_DEFINED)]


def make(path: Path, **more: Any) -> Tokenizer:
    """Control tokens, tokens that are taken whole, bytes, then the plain ones."""
    tokens = [*SPECIAL, *((f"<0x{byte:02X}>", BYTE) for byte in range(256)), *((text, NORMAL) for text in PLAIN)]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [text for text, _ in tokens],
        "tokenizer.ggml.scores": [0.0] * (len(tokens) - len(PLAIN)) + SCORES,
        "tokenizer.ggml.token_type": Typed(ValueType.INT32, [kind for _, kind in tokens]),
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_space_prefix": False,
    }
    return Tokenizer(anyio.run(read_header, write_gguf(path, {}, metadata | more)))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return make(tmp_path / "vocabulary.gguf")


def texts(tokenizer: Tokenizer, text: str) -> list[str]:
    """What a text is cut into, without the token that begins it."""
    begin, *ids = tokenizer.encode(text)
    assert begin == 0
    assert b"".join(tokenizer.to_bytes(token) for token in ids).decode() == text
    return [tokenizer._texts[token] for token in ids]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", []),
        ("abc", ["a", "bc"]),  # the pair with the highest score, not the first one
        ("ab", ["ab"]),
        ("aab", ["a", "ab"]),
        ("abab", ["ab", "ab"]),
        (" ab", ["▁a", "b"]),  # of two with one score the left one
        ("a é", ["a", "▁", "é"]),
        ("aü", ["a", "<0xC3>", "<0xBC>"]),
        ("a\n\n\nb\n", ["a", "\n\n", "\n", "b", "\n"]),
        ("<eos>", [f"<0x{byte:02X}>" for byte in b"<eos>"]),
    ],
)
def test_the_best_pairs_are_merged_first(tokenizer: Tokenizer, text: str, pieces: list[str]) -> None:
    assert texts(tokenizer, text) == pieces


def test_control_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    assert [tokenizer.to_bytes(token) for token in (0, tokenizer.end)] == [b"", b""]


@pytest.mark.parametrize(
    "more",
    [
        {"tokenizer.ggml.model": "gpt2"},
        {"tokenizer.ggml.add_space_prefix": True},
        {"tokenizer.ggml.token_type": Typed(ValueType.INT32, [NORMAL] * 268)},
    ],
)
def test_other_vocabularies_are_refused(tmp_path: Path, more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"tokenizer|bytes"):
        make(tmp_path / "vocabulary.gguf", **more)


@pytest.mark.demo
def test_every_text_is_cut_as_llama_cpp_cuts_it() -> None:
    tokenizer = Tokenizer(anyio.run(read_header, cache_folder() / NAME))
    assert len(REFERENCE["tokens"]) > 10
    for case in REFERENCE["tokens"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        if "▁" not in case["text"]:  # which becomes a space
            assert b"".join(tokenizer.to_bytes(token) for token in case["ids"]).decode() == case["text"]
