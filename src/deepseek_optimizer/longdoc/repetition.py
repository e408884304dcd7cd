"""Detects text that repeats itself, as small models with greedy decoding may produce."""

from __future__ import annotations

MAX_UNIT = 240  # maximum characters of the repeated passage
TIMES = 4  # consecutive repetitions
_INTERVAL = 32  # tokens between two checks of a growing text
MIN_LENGTH = 120  # characters of all repetitions together: horizontal rules and dots are shorter


class Watch:
    """Checks a growing text at intervals."""

    def __init__(self) -> None:
        self._next = _INTERVAL

    def first_time(self, text: str, tokens: int) -> str | None:
        """`first_time` of the text, which has `tokens` tokens; None also if it is not time for a check."""
        if tokens < self._next:
            return None
        self._next = tokens + _INTERVAL
        return first_time(text)


def first_time(text: str) -> str | None:
    """A text that ends with repetitions of a passage, truncated after the first one; None if it does not repeat itself.

    The shortest passage is used. Only the end of the text is checked, so it can be called while the text grows.
    """
    for unit in range(1, min(MAX_UNIT, len(text) // TIMES) + 1):
        times = max(TIMES, -(-MIN_LENGTH // unit))
        if len(text) < unit * times or text[-unit * (times - 1) :] != text[-unit * times : -unit]:
            continue
        passage, end = text[-unit:], len(text) - unit
        while text.endswith(passage, 0, end):
            end -= unit
        return text[: end + unit]
    return None
