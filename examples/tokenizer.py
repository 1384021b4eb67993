"""The tokenizer that a GGUF file carries: SentencePiece's merging of pairs by score, as llama.cpp does it."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator
from typing import Any, Final

from asyncload.gguf import Header

__all__ = ["Tokenizer"]

# The types of tokens: llama.h, `llama_token_type`.
_CONTROL: Final = 3
_USER_DEFINED: Final = 4
_BYTE: Final = 6
_SPACE: Final = "▁"


class Tokenizer:
    """Turns text into token ids and back, by the vocabulary in a header's metadata.

    It reads the whole vocabulary, which takes some tenths of a second for a large one. Raises ``ValueError`` for a
    vocabulary of another kind than SentencePiece's pairs, and for one without a token for each byte.
    """

    def __init__(self, header: Header) -> None:
        metadata: Any = header.metadata
        if metadata.get("tokenizer.ggml.model") != "llama" or metadata.get("tokenizer.ggml.add_space_prefix", True):
            raise ValueError("the file's tokenizer is not of the kind that Gemma 3 has")
        self._texts: list[str] = metadata["tokenizer.ggml.tokens"][:]
        self._scores: list[float] = metadata["tokenizer.ggml.scores"][:]
        self._types: list[int] = metadata["tokenizer.ggml.token_type"][:]
        self._ids = {text: token for token, text in enumerate(self._texts)}
        self._bytes = {int(self._texts[token][3:5], 16): token for token in self._of_type(_BYTE)}  # "<0x0A>"
        if len(self._bytes) != 256:  # noqa: PLR2004 - of a byte's values
            raise ValueError(f"the vocabulary has tokens for {len(self._bytes)} of 256 bytes")
        whole = sorted((self._texts[token] for token in self._of_type(_USER_DEFINED)), key=len, reverse=True)
        self._whole = re.compile(f"({'|'.join(map(re.escape, whole)) or '(?!)'})")
        self._begin: int = metadata["tokenizer.ggml.bos_token_id"]
        self.end: Final[int] = metadata["tokenizer.ggml.eos_token_id"]

    def _of_type(self, kind: int) -> list[int]:
        return [token for token, other in enumerate(self._types) if other == kind]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, behind the token that begins every text; control tokens in it are text like any other."""
        ids = [self._begin]
        for index, piece in enumerate(self._whole.split(text)):
            # Every other piece is a token that is taken whole, before any merging.
            ids += [self._ids[piece]] if index % 2 else self._merge(list(piece.replace(" ", _SPACE)))
        return ids

    def _merge(self, symbols: list[str]) -> Iterator[int]:
        """Merges neighbours into the token with the highest score, the leftmost first, while there is any."""
        following = [*range(1, len(symbols)), -1] if symbols else []
        previous = list(range(-1, len(symbols) - 1))
        pairs: list[tuple[float, int, str]] = []

        def offer(left: int) -> None:
            if left >= 0 and (right := following[left]) >= 0:
                token = self._ids.get(text := symbols[left] + symbols[right])
                if token is not None:
                    heapq.heappush(pairs, (-self._scores[token], left, text))

        for left in range(len(symbols)):
            offer(left)
        while pairs:
            _, left, text = heapq.heappop(pairs)
            right = following[left]
            if not symbols[left] or right < 0 or symbols[left] + symbols[right] != text:
                continue  # one of the two has been merged with another
            symbols[left], symbols[right] = text, ""
            following[left] = following[right]
            if following[right] >= 0:
                previous[following[right]] = left
            offer(previous[left])
            offer(left)
        for symbol in filter(None, symbols):
            if (token := self._ids.get(symbol)) is not None:
                yield token
            else:
                yield from (self._bytes[byte] for byte in symbol.encode())

    def to_bytes(self, token: int) -> bytes:
        """The part of a text that a token is, which may end within a character; nothing for a control token."""
        text, kind = self._texts[token], self._types[token]
        if kind == _BYTE:
            return bytes([int(text[3:5], 16)])
        if kind == _CONTROL:
            return b""
        return (text if kind == _USER_DEFINED else text.replace(_SPACE, " ")).encode()
