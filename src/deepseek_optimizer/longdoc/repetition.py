"""Small models that choose the likeliest token may say one thing over and over. Here a text is found to do so."""

from __future__ import annotations

MAX_UNIT = 240  # characters of what is said again
TIMES = 4  # in a row
_LOOK = 32  # tokens after which a text that grows is looked at again
LEAST = 120  # characters of all of them: rules and dots are shorter


class Watch:
    """Looks now and then at a text that grows."""

    def __init__(self) -> None:
        self._next = _LOOK

    def first_time(self, text: str, tokens: int) -> str | None:
        """`first_time` of the text that so many tokens have made; None also where it is not time to look."""
        if tokens < self._next:
            return None
        self._next = tokens + _LOOK
        return first_time(text)


def first_time(text: str) -> str | None:
    """A text that ends with the same passage several times over, up to the end of its first time. None: it does not.

    The passage is the shortest one. Looks at the end alone, so that it can be asked while a text grows.
    """
    for unit in range(1, min(MAX_UNIT, len(text) // TIMES) + 1):
        times = max(TIMES, -(-LEAST // unit))
        if len(text) < unit * times or text[-unit * (times - 1) :] != text[-unit * times : -unit]:
            continue
        passage, end = text[-unit:], len(text) - unit
        while text.endswith(passage, 0, end):
            end -= unit
        return text[: end + unit]
    return None
