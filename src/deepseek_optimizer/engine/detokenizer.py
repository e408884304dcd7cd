"""Incremental detokenization with stop strings. Does not import torch.

The concatenated pieces of text equal the text from decoding all tokens at once, except for an incomplete character at the very
end. Text that may still change is held back: a character with missing bytes, and a possible beginning of a stop string.
"""

from __future__ import annotations

from typing import Any

_INCOMPLETE = "\ufffd"  # what tokenizers decode a character with missing bytes to
_MAX_HELD = 8  # maximum number of tokens held for one character; after that, the model has written an invalid one


class Detokenizer:
    """Detokenizer of one request.

    Args:
        tokenizer: a Transformers tokenizer, or another object with `decode`.
        stop: strings that end the text.
        include_stop: the text ends after the stop string instead of before it.
        skip_special_tokens: omit special tokens from the text.
    """

    def __init__(
        self, tokenizer: Any, stop: tuple[str, ...] = (), *, include_stop: bool = False, skip_special_tokens: bool = True
    ) -> None:
        self._decode_ids, self._skip = _decoder(tokenizer), skip_special_tokens
        self._stop, self._include = stop, include_stop
        self._ids: list[int] = []
        self._start = self._read = 0  # ids[start:read] are decoded already; ids[read:] are decoded together with them
        self._held = ""  # decoded text that may be the beginning of a stop string
        self._before = ""  # text of ids[start:read]

    def add(self, token: int, *, stops: bool = True) -> tuple[str, str | None]:
        """Adds a token; returns the text that is final now, and the stop string that ends it here or None.

        Args:
            token: token id.
            stops: whether a stop string may end the text at this token.
        """
        self._ids.append(token)
        text = self._decode(self._ids[self._start :])
        if text.endswith(_INCOMPLETE) and len(self._ids) - self._read < _MAX_HELD:
            return "", None
        return self._passed(text, stops)

    def end(self) -> str:
        """Returns the text that was held back, after the last token, without an incomplete character."""
        text = self._before
        if self._read < len(self._ids):
            text = self._decode(self._ids[self._start :]).rstrip(_INCOMPLETE)
        piece, _ = self._passed(text, stops=False)
        held, self._held = self._held, ""
        return piece + held

    def _passed(self, text: str, stops: bool) -> tuple[str, str | None]:
        new = text[len(self._before) :]
        self._start, self._read = self._read, len(self._ids)
        self._before = self._decode(self._ids[self._start :])
        if not self._stop:
            return new, None
        text = self._held + new
        if stops and (match := self._first_stop(text)) is not None:
            at, stop = match
            self._held = ""
            return text[: at + len(stop)] if self._include else text[:at], stop
        keep = _overlap(text, self._stop) if stops else 0
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def _first_stop(self, text: str) -> tuple[int, str] | None:
        matches = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        return min(matches, key=lambda match: match[0]) if matches else None

    def _decode(self, ids: list[int]) -> str:
        return str(self._decode_ids(ids, self._skip))


def _overlap(text: str, stops: tuple[str, ...]) -> int:
    """Returns the length of the longest suffix of `text` that is a proper prefix of a stop string."""
    longest = min(len(text), max(map(len, stops)) - 1)
    return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops if len(stop) > n)), 0)


def _decoder(tokenizer: Any) -> Any:
    """Returns a function (ids, skip_special_tokens) -> text.

    For a fast tokenizer it is the inner `decode`, without the 20 us of checks in Transformers' wrapper.
    """
    fast = getattr(tokenizer, "_tokenizer", None)
    if fast is not None:
        return fast.decode
    return lambda ids, skip: tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
