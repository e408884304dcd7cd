"""An upper bound of a prompt's bytes, by which prompts that are too long are refused before they are tokenized.

If a token represents at most n bytes of text, a text of b bytes has at least b / n tokens. That is true only for tokenizers
that drop nothing of a text; for others there is no bound, and tokens are counted after tokenizing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ...errors import ContextLengthError

_LOSSLESS = frozenset({"ByteLevel", "Split", "Digits", "Metaspace", "Punctuation", "UnicodeScripts"})  # pre-tokenizers
_COMPOSING = frozenset({"NFC", "NFKC", "NFD", "NFKD"})
_COMPOSED = 4  # maximum ratio of input bytes to output bytes of these: NFKC maps U+1D400 to "A"


class TokenBytes(NamedTuple):
    """Sizes of a tokenizer's tokens.

    Attributes:
        max_bytes: maximum number of bytes of text that a token represents.
        lost: bytes that the tokenizer drops from a text.
    """

    max_bytes: int
    lost: bytes = b""


class PromptSize:
    """Checks prompts against the model's context before they are tokenized.

    Args:
        tokenizer: of Transformers.
        context: maximum number of tokens of a prompt; None: unlimited.
    """

    def __init__(self, tokenizer: Any, context: int | None) -> None:
        self._context = context
        self._bytes = None if context is None else bytes_of_token(tokenizer)

    @property
    def max_bytes(self) -> int | None:
        """Maximum number of bytes of a prompt; None: unknown."""
        return None if self._bytes is None or self._context is None else self._bytes.max_bytes * self._context

    def check(self, texts: Iterable[str], field: str) -> None:
        """Checks the texts of one prompt.

        Args:
            texts: whose total length is checked.
            field: of the request, for the error.

        Raises:
            ContextLengthError: the texts cannot fit the context.
        """
        if self.max_bytes is None or self._bytes is None or self._context is None:
            return
        size = sum(_kept(text, self._bytes.lost) for text in texts)
        if size > self.max_bytes:
            min_tokens = -(-size // self._bytes.max_bytes)
            raise ContextLengthError(field, too_long(self._context, min_tokens, "at least "), min_tokens, self._context)

    def check_tokens(self, prompt: Any, field: str) -> None:
        """Checks a field that may be the token ids of a prompt, or of several, before every id is validated.

        Raises:
            ContextLengthError: a prompt has more tokens than the context.
        """
        if self._context is None or not isinstance(prompt, list) or not prompt:
            return
        for ids in prompt if isinstance(prompt[0], list) else [prompt]:
            if isinstance(ids, list) and len(ids) > self._context and isinstance(ids[0], int):
                raise ContextLengthError(field, too_long(self._context, len(ids)), len(ids), self._context)

    def check_chat(self, messages: Sequence[Mapping[str, Any]], field: str = "messages") -> None:
        """Checks a chat's messages, assuming that the template contains them except for surrounding white space. Assistant
        messages are not counted, since templates omit their reasoning.

        Raises:
            ContextLengthError: see `check`.
        """
        if self.max_bytes is not None:
            self.check((text for message in messages if message["role"] != "assistant" for text in _said(message)), field)


def too_long(context: int, tokens: int, about: str = "") -> str:
    """The message for a prompt that does not fit. It begins as OpenAI's does, by which clients recognize it, and has words of
    llama-server's ("too large") and vLLM's ("Please ...")."""
    return (
        f"This model's maximum context length is {context} tokens, but the prompt has {about}{tokens}: it is too large. "
        "Please reduce the length of the input prompt"
    )


def bytes_of_token(tokenizer: Any) -> TokenBytes | None:
    """Computes the sizes of a tokenizer's tokens; None if there is no bound."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.truncation is not None or type(backend.model).__name__ != "BPE":
        return None
    if any(token.lstrip or token.rstrip for token in tokenizer.added_tokens_decoder.values()):  # they absorb white space
        return None
    shrinks = _shrinks(backend.normalizer)
    steps = [] if backend.pre_tokenizer is None else list(_steps(_state(backend.pre_tokenizer), "pretokenizers"))
    if shrinks is None or any(step["type"] not in _LOSSLESS or step.get("behavior") == "Removed" for step in steps):
        return None
    vocabulary, lost = backend.get_vocab(), b""
    added = [len(token.content.encode()) for token in tokenizer.added_tokens_decoder.values()]
    if any(step["type"] == "ByteLevel" for step in steps):  # each of a token's characters is a byte
        lost = bytes(byte for byte, character in _byte_level().items() if character not in vocabulary)
        longest = max(map(len, vocabulary))
    elif backend.model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        longest = max(len(token.encode()) for token in vocabulary)
    else:
        return None
    return TokenBytes(max([longest, *added]) * shrinks, lost)


def _byte_level() -> dict[int, str]:
    """The character that byte-level tokenizers use for each byte; printable characters represent themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters = {byte: chr(byte) for byte in printable}
    return characters | {byte: chr(0x100 + n) for n, byte in enumerate(sorted(set(range(256)) - set(printable)))}


def _kept(text: str, lost: bytes) -> int:
    """Number of bytes of a text without those that are dropped; fast for ASCII, as most large texts are."""
    if text.isascii():
        return len(text) - sum(text.count(chr(byte)) for byte in lost if byte < 0x80)
    return len(text.encode().translate(None, lost))


def _shrinks(normalizer: Any) -> int | None:
    """Maximum ratio of a text's bytes before normalization to those after it; None: unlimited."""
    times = 1
    for step in [] if normalizer is None else _steps(_state(normalizer), "normalizers"):
        if step["type"] in _COMPOSING:
            times *= _COMPOSED
        elif step["type"] == "Replace":
            pattern = step["pattern"].get("String")
            if pattern is None or len(pattern.encode()) > len(step["content"].encode()):
                return None
        elif step["type"] not in ("Prepend", "ByteLevel"):
            return None
    return times


def _state(part: Any) -> dict[str, Any]:
    """A component of a tokenizer in the format of tokenizer.json."""
    state: dict[str, Any] = json.loads(part.__getstate__())
    return state


def _steps(state: dict[str, Any], name: str) -> Iterable[dict[str, Any]]:
    """The steps of a sequence, or the component itself if it is none."""
    if state["type"] == "Sequence":
        for step in state[name]:
            yield from _steps(step, name)
    else:
        yield state


def _said(message: Mapping[str, Any]) -> Iterable[str]:
    content = message.get("content") or ""
    if isinstance(content, str):
        yield content.strip()
    else:
        yield from (part["text"].strip() for part in content if isinstance(part.get("text"), str))
