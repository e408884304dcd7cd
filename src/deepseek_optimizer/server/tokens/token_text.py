"""Single tokens as text and bytes, for log probabilities."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from ...engine.request import TokenLogprob

_BYTE_LEVEL = "ByteLevel"


class TokenTexts:
    """Of a tokenizer. A token that is part of a character has bytes of its own, which its decoded text (U+FFFD) does not tell.

    Args:
        tokenizer: of Transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._byte_level = backend is not None and _BYTE_LEVEL in repr(backend.decoder)
        self._added = set(getattr(tokenizer, "added_tokens_decoder", {}))
        self.bytes = lru_cache(maxsize=65_536)(self._bytes)

    def text(self, token: int) -> str:
        """As OpenAI writes it: half a character is `bytes:` and its escaped bytes."""
        raw = self.bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _bytes(self, token: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # the model's vocabulary is padded
            return b""
        if token not in self._added:
            if self._byte_level and all(c in _BYTES for c in piece):
                return bytes(_BYTES[c] for c in piece)
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return bytes([int(piece[3:5], 16)])
            if not self._byte_level:
                return piece.replace("\u2581", " ").encode()
        return piece.encode()


def _byte_characters() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others are shifted behind 255."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(shifted)}


_BYTES = _byte_characters()


def finite(value: float) -> float:
    """A log probability that JSON can hold: -9999, as OpenAI has it, for what is forbidden."""
    return value if math.isfinite(value) else -9999.0


def chat_logprobs(found: list[TokenLogprob], texts: TokenTexts, top: bool = True) -> list[dict[str, Any]]:
    """As /v1/chat/completions and /v1/responses have them."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": texts.text(token), "logprob": finite(logprob), "bytes": list(texts.bytes(token))}

    return [
        {**entry(one.token, one.logprob), "top_logprobs": [entry(token, value) for token, value in one.top] if top else []}
        for one in found
    ]


def completion_logprobs(found: list[TokenLogprob], texts: TokenTexts, offset: int, most: int) -> tuple[dict[str, Any], int]:
    """As /v1/completions has them, and the offset behind them, in characters: half a character counts as none."""
    tokens, offsets = [], []
    for one in found:
        tokens.append(texts.text(one.token))
        offsets.append(offset)
        offset += len(texts.bytes(one.token).decode(errors="ignore"))
    top = [{texts.text(token): finite(value) for token, value in one.top} for one in found] if most else None
    values = {
        "tokens": tokens,
        "token_logprobs": [finite(one.logprob) for one in found],
        "top_logprobs": top,
        "text_offset": offsets,
    }
    return values, offset
