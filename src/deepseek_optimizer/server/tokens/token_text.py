"""Single tokens as text and bytes, for log probabilities."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from ...engine.request import TokenLogprob

_BYTE_LEVEL = "ByteLevel"


class TokenTexts:
    """Texts and bytes of a tokenizer's tokens. The bytes of a token that is part of a character are not recoverable from its
    decoded text, which is U+FFFD.

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
        """The token's text in OpenAI's format: part of a character is `bytes:` followed by its escaped bytes."""
        raw = self.bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _bytes(self, token: int) -> bytes:
        text = self._tokenizer.convert_ids_to_tokens(token)
        if text is None:  # the model's vocabulary is padded
            return b""
        if token not in self._added:
            if self._byte_level and all(c in _BYTES for c in text):
                return bytes(_BYTES[c] for c in text)
            if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                return bytes([int(text[3:5], 16)])
            if not self._byte_level:
                return text.replace("\u2581", " ").encode()
        return text.encode()


def _byte_characters() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones represent themselves, the others are shifted to 256 and above."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(shifted)}


_BYTES = _byte_characters()


def finite(value: float) -> float:
    """A log probability that JSON can represent: -9999, as OpenAI uses, in place of minus infinity."""
    return value if math.isfinite(value) else -9999.0


def chat_logprobs(logprobs: list[TokenLogprob], texts: TokenTexts, top: bool = True) -> list[dict[str, Any]]:
    """Log probabilities in the format of /v1/chat/completions and /v1/responses.

    Args:
        logprobs: of consecutive tokens.
        texts: of the model's tokens.
        top: whether to include the most likely tokens.
    """

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": texts.text(token), "logprob": finite(logprob), "bytes": list(texts.bytes(token))}

    return [
        {**entry(one.token, one.logprob), "top_logprobs": [entry(token, value) for token, value in one.top] if top else []}
        for one in logprobs
    ]


def completion_logprobs(logprobs: list[TokenLogprob], texts: TokenTexts, offset: int, count: int) -> tuple[dict[str, Any], int]:
    """Log probabilities in the format of /v1/completions.

    Args:
        logprobs: of consecutive tokens.
        texts: of the model's tokens.
        offset: of the first token in the answer's text, in characters; an incomplete character counts as none.
        count: number of most likely tokens requested; 0: they are omitted.

    Returns: the log probabilities, and the offset after the last token.
    """
    tokens, offsets = [], []
    for one in logprobs:
        tokens.append(texts.text(one.token))
        offsets.append(offset)
        offset += len(texts.bytes(one.token).decode(errors="ignore"))
    top = [{texts.text(token): finite(value) for token, value in one.top} for one in logprobs] if count else None
    values = {
        "tokens": tokens,
        "token_logprobs": [finite(one.logprob) for one in logprobs],
        "top_logprobs": top,
        "text_offset": offsets,
    }
    return values, offset
