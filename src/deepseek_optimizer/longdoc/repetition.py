"""Small models that choose the likeliest token may say one thing over and over. Here a text is found to do so."""

from __future__ import annotations

MOST_UNIT = 240  # characters of what is said again
TIMES = 4  # in a row
LEAST = 120  # characters of all of them: rules and dots are shorter


def first_time(text: str) -> str | None:
    """A text that ends with the same passage several times over, up to the end of its first time. None: it does not.

    The passage is the shortest one. Looks at the end alone, so that it can be asked while a text grows.
    """
    for unit in range(1, min(MOST_UNIT, len(text) // TIMES) + 1):
        times = max(TIMES, -(-LEAST // unit))
        if len(text) < unit * times or text[-unit * (times - 1) :] != text[-unit * times : -unit]:
            continue
        passage, end = text[-unit:], len(text) - unit
        while text.endswith(passage, 0, end):
            end -= unit
        return text[: end + unit]
    return None
