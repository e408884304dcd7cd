"""DRY ("don't repeat yourself"): penalizes tokens that would extend a repetition of earlier text. No torch.

The definition is llama.cpp's (`llama_sampler_dry_apply` in src/llama-sampler.cpp, after p-e-w's
https://github.com/oobabooga/text-generation-webui/pull/5677), but the lengths of repetitions are updated with every token
instead of being recomputed: one vector operation per token, whatever the text.
"""

from __future__ import annotations

import math

import numpy as np

from ...backends.sampling import Change
from ..request import SamplingParams

_LARGEST = 88.7228391  # natural logarithm of the largest float32, as in llama.cpp: limits the penalty
_MAX_PENALTY = 1e30  # a logit minus it is finite, and remains so divided by any temperature


class Dry:
    """State of one request.

    Args:
        sampling: the request's; `dry_multiplier` is above 0.
        prompt: token ids.
    """

    def __init__(self, sampling: SamplingParams, prompt: list[int]) -> None:
        self._sampling, self._breakers = sampling, sampling.dry_breakers
        self._tails = sorted({len(tail) for tails in self._breakers.values() for tail in tails})
        self._last_n = sampling.dry_last_n
        text = prompt if self._last_n is None else prompt[max(0, len(prompt) - self._last_n) :]
        self._count = len(text)
        self._tokens = np.zeros(self._count + 256, np.int64)
        self._tokens[: self._count] = text
        # At i: the number of tokens, backwards from i, that equal those backwards from the end of the text.
        self._lengths = np.zeros(len(self._tokens), np.int64)
        self._lengths[: self._count] = common_suffixes(text)
        self._head, self._end = -1, -1  # positions of the first and the last token of the latest breaker
        for end in range(self._count):
            self._find_breaker(end)

    def add(self, token: int) -> None:
        """Appends a token of the text."""
        if self._count == len(self._tokens):
            self._tokens, self._lengths = (np.concatenate([a, np.zeros_like(a)]) for a in (self._tokens, self._lengths))
        n = self._count
        start = self._start(n + 1)
        if n > start:
            same = self._tokens[start:n] == token
            self._lengths[start + 1 : n] = np.where(same[1:], self._lengths[start : n - 1] + 1, 0)
            self._lengths[start] = same[0]
        self._tokens[n] = token
        self._count += 1
        self._find_breaker(n)

    def changes(self) -> list[Change]:
        """The penalties, which are subtracted."""
        sampling, n = self._sampling, self._count
        start = self._start(n)
        window = n - start
        limit = min(window, n - 1 - self._end) if self._head >= start else window
        allowed = sampling.dry_allowed_length
        if window <= allowed or limit < allowed:
            return []
        lengths = np.minimum(np.minimum(self._lengths[start : n - 1], np.arange(1, window)), limit)
        places = np.flatnonzero(lengths >= allowed)
        tokens, which = np.unique(self._tokens[start + 1 + places], return_inverse=True)
        longest = np.zeros(len(tokens), np.int64)
        np.maximum.at(longest, which, lengths[places])
        exponents = (longest - allowed).astype(np.float64)
        if sampling.dry_base > 1.000001:
            exponents = np.minimum(exponents, int(_LARGEST / math.log(sampling.dry_base)))
        penalties = np.minimum(sampling.dry_multiplier * np.power(sampling.dry_base, exponents), _MAX_PENALTY)
        free = np.array([() in self._breakers.get(token, ()) for token in tokens.tolist()], bool)
        penalties[free] = 0
        return [Change(tokens, added=-penalties.astype(np.float32))]

    def _start(self, count: int) -> int:
        """The first position that is searched in a text of `count` tokens."""
        return 0 if self._last_n is None else max(0, count - self._last_n)

    def _find_breaker(self, end: int) -> None:
        """Records the breaker that ends at this position: among several, the one that begins last, then the longest."""
        for tail in self._tails:
            head = end - tail
            if head < max(0, self._head):
                return
            rest = self._breakers.get(int(self._tokens[head]))
            if rest is not None and tuple(self._tokens[head + 1 : end + 1].tolist()) in rest:
                self._head, self._end = head, end
                return


def common_suffixes(text: list[int]) -> list[int]:
    """For each position i, the number of tokens backwards from i that equal those backwards from the last token; 0 at the last
    position. The Z-function of the reversed text, in linear time (Gusfield 1997, "Algorithms on Strings, Trees, and Sequences",
    section 1.4)."""
    reverse, n = text[::-1], len(text)
    z = [0] * n
    left = right = 0
    for k in range(1, n):
        length = min(right - k, z[k - left]) if k < right else 0
        while k + length < n and reverse[length] == reverse[k + length]:
            length += 1
        if k + length > right:
            left, right = k, k + length
        z[k] = length
    return z[::-1]
