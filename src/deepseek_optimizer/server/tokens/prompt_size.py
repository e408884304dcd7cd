"""How many bytes a prompt can have at most: longer ones are refused before any work is done for them.

A token stands for so many bytes of text at most, so a text has at least its bytes / that many tokens. That holds only for
tokenizers that lose nothing of a text; for others nothing is known beforehand, and tokens are counted when they are made.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ...errors import RequestError

_KEEPING = frozenset({"ByteLevel", "Split", "Digits", "Metaspace", "Punctuation", "UnicodeScripts"})  # pre-tokenizers
_COMPOSING = frozenset({"NFC", "NFKC", "NFD", "NFKD"})
_COMPOSED = 4  # times the bytes of what they make that they may take in: U+1D400 is "A" in NFKC


class TokenBytes(NamedTuple):
    """
    Attributes:
        most: bytes of text that a token stands for at most.
        lost: bytes that the tokenizer leaves out of a text.
    """

    most: int
    lost: bytes = b""


class PromptSize:
    """
    Args:
        tokenizer: of Transformers.
        context: tokens that a prompt may have; None: any number.
    """

    def __init__(self, tokenizer: Any, context: int | None) -> None:
        self._context = context
        self._bytes = None if context is None else bytes_of_token(tokenizer)

    @property
    def most(self) -> int | None:
        """Bytes of a prompt; None: not known."""
        return None if self._bytes is None or self._context is None else self._bytes.most * self._context

    def check(self, texts: Iterable[str], field: str) -> None:
        """Of one prompt.

        Raises:
            RequestError: the texts can't fit.
        """
        if self.most is None or self._bytes is None:
            return
        size = sum(_kept(text, self._bytes.lost) for text in texts)
        if size > self.most:
            least = -(-size // self._bytes.most)
            raise RequestError(
                field,
                f"{size:,} bytes are {least:,} tokens at least, and the model's context has {self._context:,}; shorten it",
            )

    def check_tokens(self, prompt: Any, field: str) -> None:
        """Of what may be a prompt's tokens, or those of several, before each of them is looked at.

        Raises:
            RequestError: there are more than the context has.
        """
        if self._context is None or not isinstance(prompt, list) or not prompt:
            return
        for ids in prompt if isinstance(prompt[0], list) else [prompt]:
            if isinstance(ids, list) and len(ids) > self._context and isinstance(ids[0], int):
                raise RequestError(
                    field, f"{len(ids):,} tokens, and the model's context has {self._context:,}; shorten it"
                )  # fmt: skip

    def check_chat(self, messages: Sequence[Mapping[str, Any]], field: str = "messages") -> None:
        """Of a chat whose template shows all that people say, but for white space around it. What the assistant said is not
        counted: templates leave out its past thoughts.

        Raises:
            RequestError: as of `check`.
        """
        if self.most is not None:
            self.check((text for message in messages if message["role"] != "assistant" for text in _said(message)), field)


def bytes_of_token(tokenizer: Any) -> TokenBytes | None:
    """None: that can't be told."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.truncation is not None or type(backend.model).__name__ != "BPE":
        return None
    if any(token.lstrip or token.rstrip for token in tokenizer.added_tokens_decoder.values()):  # they swallow white space
        return None
    shrinks = _shrinks(backend.normalizer)
    steps = [] if backend.pre_tokenizer is None else list(_steps(_state(backend.pre_tokenizer), "pretokenizers"))
    if shrinks is None or any(step["type"] not in _KEEPING or step.get("behavior") == "Removed" for step in steps):
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
    """Byte -> the character that byte-level tokenizers write for it: those that can be seen stand for themselves."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    found = {byte: chr(byte) for byte in seen}
    return found | {byte: chr(0x100 + n) for n, byte in enumerate(sorted(set(range(256)) - set(seen)))}


def _kept(text: str, lost: bytes) -> int:
    """Bytes of a text without those that are lost; quick where it is ASCII, as large ones mostly are."""
    if text.isascii():
        return len(text) - sum(text.count(chr(byte)) for byte in lost if byte < 0x80)
    return len(text.encode().translate(None, lost))


def _shrinks(normalizer: Any) -> int | None:
    """How many times as many bytes a text may have before it as behind it; None: any number."""
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
    """What a part of a tokenizer is, as tokenizer.json has it."""
    found: dict[str, Any] = json.loads(part.__getstate__())
    return found


def _steps(state: dict[str, Any], name: str) -> Iterable[dict[str, Any]]:
    """Those of a sequence, or the one there is."""
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
