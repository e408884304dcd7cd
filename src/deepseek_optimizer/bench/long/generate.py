"""Generates samples of an exact length in tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from ...chat.conversation import prompt_tokens
from ...errors import ConfigError
from .sample import Sample
from .tasks import TASKS, Draft

SLACK = 0.01  # a prompt may be shorter than requested by this share, so that it is found in few steps
_AIM = 0.996
_PROBE = 400  # words from which tokens per word are estimated


def make_sample(task: str, tokenizer: Any, tokens: int, *, seed: int = 0, depth: float | None = None) -> Sample:
    """
    Args:
        task: name in `TASKS`.
        tokenizer: the model's; a prompt is a user message in its chat template, if it has one.
        tokens: maximum length of the prompt including the template; it is at most 1% or one word shorter.
        seed: the same seed, task, tokens and tokenizer give the same sample.
        depth: position of the fact in the text, 0 to 1; None: random.

    Raises:
        ConfigError: the task is unknown, or does not fit into so few tokens.
    """
    if task not in TASKS:
        raise ConfigError(f"unknown task {task!r}; use one of {', '.join(TASKS)}")
    rng = random.Random(f"{task} {tokens} {seed}")
    depth = rng.random() if depth is None else depth

    def count(prompt: str) -> int:
        return len(ids_of(tokenizer, prompt))

    words = _about(count, TASKS[task](random.Random(0), depth, _PROBE), tokens)
    draft = TASKS[task](rng, depth, words)
    prompt, length = _fit(count, draft, tokens, words, task)
    return Sample(task, prompt, draft.answers, draft.depth, length)


def ids_of(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt."""
    return prompt_tokens(tokenizer, [{"role": "user", "content": prompt}])


def _about(count: Callable[[str], int], draft: Draft, tokens: int) -> int:
    """Estimated number of words for this number of tokens."""
    few, many = count(draft.prompt(_PROBE)), count(draft.prompt(2 * _PROBE))
    return max(1, round(_PROBE + (tokens - few) * _PROBE / max(1, many - few)))


def _fit(count: Callable[[str], int], draft: Draft, tokens: int, words: int, task: str) -> tuple[str, int]:
    """The prompt with as many words as fit, and its length in tokens. Counting dominates the time, so each count narrows the
    range as much as possible."""
    low, high = 0, None  # a number of words that fits, and one that is too large
    longest: tuple[str, int] | None = None  # that fits
    for _ in range(40):
        prompt = draft.prompt(words)
        length = count(prompt)
        if length <= tokens and length >= tokens * (1 - SLACK):
            return prompt, length
        if length > tokens:
            high = words
        else:
            low, longest = words, (prompt, length)
        guess = round(words + (tokens * _AIM - length) * words / max(1, length))
        top = high if high is not None else 2 * max(words, guess)
        if top - low <= 1:
            break
        words = min(max(guess, low + 1), top - 1)
    if longest is not None:
        return longest
    raise ConfigError(f"{task}: {tokens} tokens are too few for this task; use at least 1024")
