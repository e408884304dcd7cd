"""What both sides of a comparison are asked: the same for the same seed, and never twice in a run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

PAUSE = 0.3  # seconds before each short chat: the engine is idle by then

_SUBJECTS = ("a fox", "the moon", "rust", "a violin", "paper", "rain", "a lighthouse", "salt", "a clock", "honey", "ice", "ink")
_ASKED = ("What is {} good for?", "Tell me something about {}.", "Why do people like {}?", "Describe {} in one line.")


def random_prompts(seed: int, count: int, length: int, vocabulary: int) -> list[list[int]]:
    """Token ids; the first ones of a vocabulary are often special, and left out."""
    found: list[list[int]] = np.random.default_rng(seed).integers(10, vocabulary, (count, length)).tolist()
    return found


def chats(seed: int, count: int) -> Iterator[list[dict[str, str]]]:
    """Short questions, no two of them alike.

    Raises: ValueError, there are not so many.
    """
    questions = [asked.format(subject) for asked in _ASKED for subject in _SUBJECTS]
    for place in np.random.default_rng(seed).choice(len(questions), count, replace=False):
        yield [{"role": "user", "content": questions[place]}]
