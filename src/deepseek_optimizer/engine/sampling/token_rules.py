"""Rules that change the logits of one request: penalties on tokens that occurred before, and forbidden tokens. No torch."""

from __future__ import annotations

from collections import Counter, deque
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ...backends.sampling import Change
from ..request import SamplingParams
from .dry import Dry

# Logits divided by it and by any temperature are finite. Smaller penalties have the same effect: a token seen is certain.
MIN_PENALTY = 1e-25


def barred(tokens: npt.NDArray[np.int64]) -> Change:
    """A change after which tokens [n] are not chosen."""
    return Change(tokens, added=np.full(len(tokens), -np.inf, np.float32))


class Rule(Protocol):
    """Changes the logits of one request, depending on its tokens so far."""

    def changes(self) -> list[Change]:
        """The changes of the logits of the next token."""

    def add(self, token: int) -> None:
        """Appends a token of the text."""


class Repetition:
    """Divides positive and multiplies negative logits of tokens that occurred by a factor, as Transformers does.

    Args:
        penalty: the factor.
        window: number of last tokens that count; None: all.
        prompt: token ids, which count as well.
        vocab_size: number of logits.
    """

    def __init__(self, penalty: float, window: int | None, prompt: list[int], vocab_size: int) -> None:
        self._penalty = np.float32(max(penalty, MIN_PENALTY))
        self._seen: npt.NDArray[np.bool_] = np.zeros(vocab_size, np.bool_)
        self._window = window
        self._last: deque[int] = deque()  # the tokens in the window, and how often each occurs
        self._counts = Counter[int]()
        if window is None:
            self._seen[prompt] = True
        else:
            for token in prompt[max(0, len(prompt) - window) :]:
                self.add(token)

    def add(self, token: int) -> None:
        """Appends a token of the text."""
        self._seen[token] = True
        if self._window is None:
            return
        self._last.append(token)
        self._counts[token] += 1
        if len(self._last) > self._window:
            oldest = self._last.popleft()
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest]
                self._seen[oldest] = False

    def changes(self) -> list[Change]:
        """The factor of all tokens that occurred."""
        return [Change(np.flatnonzero(self._seen), float(self._penalty))]


class Frequency:
    """OpenAI's frequency and presence penalties on tokens of the text."""

    def __init__(self, frequency: float, presence: float) -> None:
        self._frequency, self._presence = np.float32(frequency), np.float32(presence)
        self._counts = Counter[int]()

    def add(self, token: int) -> None:
        """Appends a token of the text."""
        self._counts[token] += 1

    def changes(self) -> list[Change]:
        """The penalties of the tokens of the text."""
        if not self._counts:
            return []
        tokens = np.fromiter(self._counts, np.int64)
        counts = np.fromiter(self._counts.values(), np.float32)
        return [Change(tokens, added=-(self._frequency * counts + self._presence))]


class BadWords:
    """Forbids a token if it would complete one of these sequences of tokens in the text, as vLLM does (`apply_bad_words` in
    vllm/v1/sample/ops/bad_words.py).

    Args:
        words: sequences of at least one token.
    """

    def __init__(self, words: tuple[tuple[int, ...], ...]) -> None:
        self._single = np.array([word[0] for word in words if len(word) == 1], np.int64)
        self._longer = [(word[:-1], word[-1]) for word in words if len(word) > 1]
        self._last: deque[int] = deque(maxlen=max(map(len, words)) - 1)

    def add(self, token: int) -> None:
        """Appends a token of the text."""
        self._last.append(token)

    def changes(self) -> list[Change]:
        """Bars the tokens that would complete a sequence."""
        last = tuple(self._last)
        ends = [token for beginning, token in self._longer if last[-len(beginning) :] == beginning]
        return [barred(np.concatenate([self._single, np.array(ends, np.int64)]))]


class AllowedTokens:
    """Forbids all other tokens.

    Args:
        allowed: token ids.
        vocab_size: number of logits.
    """

    def __init__(self, allowed: tuple[int, ...], vocab_size: int) -> None:
        self._change = barred(np.setdiff1d(np.arange(vocab_size), np.array(allowed, np.int64)))

    def add(self, token: int) -> None:
        """Does nothing: the set of tokens does not change."""

    def changes(self) -> list[Change]:
        """Bars all other tokens."""
        return [self._change]


def rules_of(sampling: SamplingParams, prompt: list[int], vocab_size: int) -> list[Rule]:
    """The rules of a request, in their order.

    Args:
        sampling: the request's.
        prompt: token ids.
        vocab_size: number of logits.
    """
    rules: list[Rule] = []
    if sampling.repetition_penalty != 1:
        rules.append(Repetition(sampling.repetition_penalty, sampling.repetition_window, prompt, vocab_size))
    if sampling.presence_penalty or sampling.frequency_penalty:
        rules.append(Frequency(sampling.frequency_penalty, sampling.presence_penalty))
    if sampling.dry_multiplier and sampling.dry_last_n != 0:
        rules.append(Dry(sampling, prompt))
    if sampling.bad_words:
        rules.append(BadWords(sampling.bad_words))
    if sampling.allowed_token_ids is not None:
        rules.append(AllowedTokens(sampling.allowed_token_ids, vocab_size))
    return rules
