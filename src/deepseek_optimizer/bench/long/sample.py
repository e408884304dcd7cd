"""A text with a question, and how an answer to it is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """
    Attributes:
        task: name in `TASKS`.
        prompt: what the model reads, instruction, text and question, without a chat template.
        answers: strings that a right answer holds, all of them.
        depth: where in the text `answers[0]` stands, 0 to 1; None where it stands all over it.
        tokens: of the prompt as the model reads it, the chat template's among them where the tokenizer has one.
    """

    task: str
    prompt: str
    answers: tuple[str, ...]
    depth: float | None
    tokens: int


def score(answers: Sequence[str], text: str) -> float:
    """Share of the answers that the text holds, upper and lower case alike: RULER's recall. 0 to 1."""
    given = text.lower()
    return sum(answer.lower() in given for answer in answers) / len(answers)
