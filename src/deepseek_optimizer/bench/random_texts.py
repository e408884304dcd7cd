"""Prompts of a given number of tokens for a server whose tokenizer is unknown: random words, counted by the server itself."""

from __future__ import annotations

import random
from dataclasses import dataclass

_WORDS = (
    "able", "air", "animal", "answer", "apple", "area", "back", "ball", "bank", "base", "bed", "bird", "blue", "boat", "body",
    "book", "box", "bread", "bridge", "car", "case", "chair", "child", "city", "class", "cloud", "coast", "cold", "color",
    "corn", "cost", "count", "cow", "day", "deep", "desk", "dog", "door", "dream", "dry", "ear", "earth", "east", "egg",
    "end", "eye", "face", "farm", "field", "fire", "fish", "floor", "food", "foot", "force", "form", "fruit", "game", "garden",
    "girl", "glass", "gold", "grass", "green", "group", "hair", "hand", "head", "heart", "heat", "hill", "home", "horse",
    "hour", "house", "ice", "iron", "island", "job", "key", "king", "lake", "land", "leaf", "letter", "life", "light",
    "line", "list", "map", "market", "milk", "mind", "money", "moon", "mountain", "mouth", "music", "name", "night", "north",
    "note", "oil", "page", "paper", "park", "part", "path", "people", "piece", "place", "plan", "plant", "point", "power",
    "rain", "red", "rest", "rice", "river", "road", "rock", "room", "rule", "salt", "sand", "school", "sea", "ship", "shop",
)  # fmt: skip


@dataclass(frozen=True)
class TokenCount:
    """How many prompt tokens a server counts for n random words: `fixed + per_word * n`. The fixed part is that of its chat
    template."""

    fixed: float
    per_word: float

    @classmethod
    def of(cls, first: tuple[int, int], second: tuple[int, int]) -> TokenCount:
        """From two texts, each as (words, prompt tokens)."""
        per_word = max((second[1] - first[1]) / (second[0] - first[0]), 0.1)
        return cls(first[1] - per_word * first[0], per_word)

    def words(self, tokens: int) -> int:
        """Number of words for about this number of prompt tokens; at least one."""
        return max(1, round((tokens - self.fixed) / self.per_word))


def random_text(words: int, rng: random.Random) -> str:
    """Random words: no two texts begin alike, so that a server's prefix cache does not help."""
    return " ".join(rng.choices(_WORDS, k=words))
