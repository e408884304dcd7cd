"""Single tokens as text and bytes, for log probabilities."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from ...engine.prompt_logprobs import PromptLogprobs
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

    def added(self, token: int) -> bool:
        """Whether it is a special token, or another one that was added to the vocabulary."""
        return token in self._added

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


class TokenIdTexts(TokenTexts):
    """Writes tokens as `token_id:ID`, as vLLM does for `return_tokens_as_token_ids`; their bytes are unchanged.

    Args:
        texts: of the model's tokens.
    """

    def __init__(self, texts: TokenTexts) -> None:
        self._texts, self.bytes = texts, texts.bytes

    def text(self, token: int) -> str:
        return f"token_id:{token}"

    def added(self, token: int) -> bool:
        return self._texts.added(token)


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
    top = [_top(one.token, one.logprob, one.top, texts) for one in logprobs] if count else None
    values = {
        "tokens": tokens,
        "token_logprobs": [finite(one.logprob) for one in logprobs],
        "top_logprobs": top,
        "text_offset": offsets,
    }
    return values, offset


def _top(token: int, logprob: float, top: Iterable[tuple[int, float]], texts: TokenTexts) -> dict[str, float]:
    """An element of `top_logprobs` in /v1/completions: the most likely tokens and, if it is none of them, the token itself. If
    several tokens have the same text, the most likely one of them."""
    values: dict[str, float] = {}
    for other, value in (*top, (token, logprob)):
        values.setdefault(texts.text(other), finite(value))
    return values


def echo_logprobs(first: int, logprobs: PromptLogprobs, texts: TokenTexts, echo: str, count: int) -> dict[str, list[Any]]:
    """Log probabilities of a whole prompt in the format of /v1/completions, in which the first token has none.

    Args:
        first: the first token.
        logprobs: of the others.
        texts: of the model's tokens.
        echo: the prompt's text, for offsets: special tokens that the tokenizer has added are not in it.
        count: number of most likely tokens; 0: `top_logprobs` is omitted.
    """
    tokens, offsets, offset = [first, *logprobs.tokens.tolist()], [], 0
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may be part of a character
    for token in tokens:
        offsets.append(min(offset, len(echo)))
        raw = texts.bytes(token)
        if not texts.added(token) or echo.startswith(raw.decode(errors="replace"), offset):
            offset += len(decoder.decode(raw))
    values = logprobs.logprobs.tolist()
    arrays: dict[str, list[Any]] = {
        "tokens": [texts.text(token) for token in tokens],
        "token_logprobs": [None, *map(finite, values)],
        "text_offset": offsets,
    }
    if count:
        rows = zip(logprobs.tokens.tolist(), values, _pairs(logprobs, count), strict=True)
        arrays["top_logprobs"] = [None, *(_top(token, value, top, texts) for token, value, top in rows)]
    return arrays


def prompt_logprob_list(logprobs: PromptLogprobs, texts: TokenTexts, count: int) -> list[dict[str, Any] | None]:
    """Log probabilities of a prompt in vLLM's format: for each token, by token id, those of the token itself and of the most
    likely ones; None for the first token.

    Args:
        logprobs: of all tokens but the first.
        texts: of the model's tokens.
        count: number of most likely tokens.
    """

    def entry(token: int, value: float, rank: int) -> dict[str, Any]:
        return {"logprob": finite(value), "rank": rank, "decoded_token": texts.text(token)}

    result: list[dict[str, Any] | None] = [None]
    own = zip(logprobs.tokens.tolist(), logprobs.logprobs.tolist(), logprobs.ranks.tolist(), strict=True)
    for (token, value, rank), top in zip(own, _pairs(logprobs, count), strict=True):
        entries = {str(token): entry(token, value, rank)}
        for place, (other, logprob) in enumerate(top, 1):
            entries.setdefault(str(other), entry(other, logprob, place))
        result.append(entries)
    return result


def _pairs(logprobs: PromptLogprobs, count: int) -> Iterator[list[tuple[int, float]]]:
    """(token, log probability) of the `count` most likely tokens at each position."""
    for tokens, values in zip(logprobs.top_tokens[:, :count].tolist(), logprobs.top_logprobs[:, :count].tolist(), strict=True):
        yield list(zip(tokens, values, strict=True))
