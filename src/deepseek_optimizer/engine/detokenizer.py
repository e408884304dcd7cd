"""Tokens to text as they come, and where a stop string ends it. No torch.

Pieces concatenate to exactly what decoding all tokens at once gives, but for half a character at the very end. What may still
change is held back: a character whose bytes are not all there, and the beginning of what may become a stop string.
"""

from __future__ import annotations

from typing import Any

_INCOMPLETE = "\ufffd"  # what a tokenizer shows for a character whose bytes are not all there yet
_MAX_HELD = 8  # tokens held for one character: after so many a broken one is what the model wrote


class Detokenizer:
    """Of one request.

    Args:
        tokenizer: has `decode`.
        stop: strings that end the text.
        include_stop: the text ends behind them, not before.
        skip_special_tokens: leaves them out of the text.
    """

    def __init__(
        self, tokenizer: Any, stop: tuple[str, ...] = (), *, include_stop: bool = False, skip_special_tokens: bool = True
    ) -> None:
        self._decode_ids, self._skip = _decoder(tokenizer), skip_special_tokens
        self._stop, self._include = stop, include_stop
        self._ids: list[int] = []
        self._start = self._read = 0  # ids[start:read] are decoded, and are the context that ids[read:] are decoded in
        self._held = ""  # decoded, and may be the beginning of a stop string
        self._before = ""  # text of ids[start:read]

    def add(self, token: int, *, stops: bool = True) -> tuple[str, str | None]:
        """Text that is now sure, and the stop string that ends it here if one does.

        Args:
            stops: whether a stop string may end the text at this token.
        """
        self._ids.append(token)
        text = self._decode(self._ids[self._start :])
        if text.endswith(_INCOMPLETE) and len(self._ids) - self._read < _MAX_HELD:
            return "", None
        return self._passed(text, stops)

    def end(self) -> str:
        """What was held back, when no more tokens come; but no beginning of a character whose rest does not."""
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
        if stops and (found := self._first_stop(text)) is not None:
            at, stop = found
            self._held = ""
            return text[: at + len(stop)] if self._include else text[:at], stop
        keep = _overlap(text, self._stop) if stops else 0
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def _first_stop(self, text: str) -> tuple[int, str] | None:
        places = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        return min(places, key=lambda found: found[0]) if places else None

    def _decode(self, ids: list[int]) -> str:
        return str(self._decode_ids(ids, self._skip))


def _overlap(text: str, stops: tuple[str, ...]) -> int:
    """Characters of the longest end of `text` that a stop string begins with."""
    longest = min(len(text), max(map(len, stops)) - 1)
    return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops if len(stop) > n)), 0)


def _decoder(tokenizer: Any) -> Any:
    """(ids, skip_special_tokens) -> text. A fast tokenizer's own, which Transformers' `decode` wraps in 20 us of checks."""
    fast = getattr(tokenizer, "_tokenizer", None)
    if fast is not None:
        return fast.decode
    return lambda ids, skip: tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
