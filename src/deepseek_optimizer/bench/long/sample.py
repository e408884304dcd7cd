"""A text with a question, and the scoring of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """
    Attributes:
        task: name in `TASKS`.
        prompt: instruction, text and question, without a chat template.
        answers: strings that a correct answer contains, all of them.
        depth: position of `answers[0]` in the text, 0 to 1; None if it occurs throughout.
        tokens: length of the prompt, including the chat template if the tokenizer has one.
    """

    task: str
    prompt: str
    answers: tuple[str, ...]
    depth: float | None
    tokens: int


def score(answers: Sequence[str], text: str) -> float:
    """Share of the answers that the text contains, ignoring case: RULER's recall, 0 to 1."""
    lower = text.lower()
    return sum(answer.lower() in lower for answer in answers) / len(answers)
