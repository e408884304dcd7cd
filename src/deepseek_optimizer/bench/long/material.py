"""The material of texts: prose from Python's documentation, and names, words and numbers that do not occur in it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from functools import lru_cache

from ...calibration.text import sample_text

# A paragraph without digits, so that it contains no number by chance.
_PROSE = re.compile(r"[A-Z][A-Za-z ,.;:'()\-/\"*_?!]{80,}\.")
_ONSETS = "b br d dr f fl g gr h k kl l m n p pr r s sk st t tr v z".split()
_VOWELS = "aeiou"
_CODAS = "l m n nd r rk rn s sk st t x".split()


@lru_cache(maxsize=1)
def paragraphs() -> tuple[tuple[str, ...], ...]:
    """Words of each paragraph of prose in Python's documentation."""
    texts = (" ".join(part.split()) for part in re.split(r"\n\s*\n", sample_text()))
    return tuple(tuple(text.split()) for text in texts if _PROSE.fullmatch(text))


@lru_cache(maxsize=1)
def _known() -> frozenset[str]:
    """All words of the prose, in lower case."""
    return frozenset(re.findall(r"[a-z]+", " ".join(word.lower() for words in paragraphs() for word in words)))


class Filler:
    """Endless prose: all paragraphs in random order, reshuffled each time they are used up."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._words: list[str] = []

    def words(self, count: int) -> list[str]:
        """The first `count` words; the same in each call."""
        while len(self._words) < count:
            order = list(paragraphs())
            self._rng.shuffle(order)
            self._words += [word for words in order for word in words]
        return self._words[:count]


def made_up(rng: random.Random, syllables: int = 2) -> Iterator[str]:
    """Unique made-up words that do not occur in the prose, in lower case."""
    return _once(lambda: "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables)))


def names(rng: random.Random) -> Iterator[str]:
    """Unique made-up names."""
    return (word.capitalize() for word in made_up(rng))


def numbers(rng: random.Random) -> Iterator[str]:
    """Unique numbers of seven digits."""
    return _once(lambda: str(rng.randrange(1_000_000, 10_000_000)))


def variables(rng: random.Random) -> Iterator[str]:
    """Unique names of five capital letters."""
    return _once(lambda: "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(5)))


def _once(draw: Callable[[], str]) -> Iterator[str]:
    """Values of `draw`, except repeated ones and words of the prose."""
    seen = set(_known())
    while True:
        drawn = draw()
        if drawn.lower() not in seen:
            seen.add(drawn.lower())
            yield drawn
