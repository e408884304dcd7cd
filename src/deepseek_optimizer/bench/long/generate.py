"""Samples of an exact length in tokens of a given tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from ...chat.conversation import prompt_tokens
from ...errors import ConfigError
from .sample import Sample
from .tasks import TASKS, Draft

SLACK = 0.01  # a prompt is shorter than asked by this share at most
_AIM = 0.996
_PROBE = 400  # words by which a tokenizer's tokens a word are measured


def make_sample(task: str, tokenizer: Any, tokens: int, *, seed: int = 0, depth: float | None = None) -> Sample:
    """
    Args:
        task: name in `TASKS`.
        tokenizer: the model's; a prompt is a user's message in its chat template, where it has one.
        tokens: of the prompt, template included: none more, and 1% less at most.
        seed: the same sample for the same seed, task, tokens and tokenizer.
        depth: where what is asked for stands, 0 to 1; None: drawn.

    Raises:
        ConfigError: no such task, or so few tokens that the task does not fit in.
    """
    if task not in TASKS:
        raise ConfigError(f"there is no task {task!r}; the tasks are {', '.join(TASKS)}")
    rng = random.Random(f"{task} {tokens} {seed}")
    depth = rng.random() if depth is None else depth

    def count(prompt: str) -> int:
        return len(ids_of(tokenizer, prompt))

    words = _about(count, TASKS[task](random.Random(0), depth, _PROBE), tokens)
    draft = TASKS[task](rng, depth, words)
    prompt, length = _fit(count, draft, tokens, words, task)
    return Sample(task, prompt, draft.answers, draft.depth, length)


def ids_of(tokenizer: Any, prompt: str) -> list[int]:
    """A prompt as the model reads it."""
    return prompt_tokens(tokenizer, [{"role": "user", "content": prompt}])


def _about(count: Callable[[str], int], draft: Draft, tokens: int) -> int:
    """Words that take about so many tokens."""
    few, many = count(draft.prompt(_PROBE)), count(draft.prompt(2 * _PROBE))
    return max(1, round(_PROBE + (tokens - few) * _PROBE / max(1, many - few)))


def _fit(count: Callable[[str], int], draft: Draft, tokens: int, words: int, task: str) -> tuple[str, int]:
    """The draft with as many words as the tokens allow: the prompt and its tokens. Counting is what takes time, so each count
    narrows the range by as much as it can."""
    low, high = 0, None  # words that are not too many, and that are
    for _ in range(40):
        prompt = draft.prompt(words)
        length = count(prompt)
        if length <= tokens and length >= tokens * (1 - SLACK):
            return prompt, length
        if length > tokens:
            high = words
        else:
            low = words
        guess = round(words + (tokens * _AIM - length) * words / max(1, length))
        top = high if high is not None else 2 * max(words, guess)
        if top - low <= 1:
            break
        words = min(max(guess, low + 1), top - 1)
    raise ConfigError(f"{task}: {tokens} tokens are too few for it; give at least 1024")
