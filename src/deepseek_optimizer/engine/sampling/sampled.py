"""The distribution that a request's token is drawn from, to report it (`SamplingParams.sampled_logprobs`). No torch."""

from __future__ import annotations

import math

import numpy as np

from ...backends.sampling import Floats
from ..request import SamplingParams, TokenLogprob
from .filters import remaining


class SampledLogprobs:
    """Reports tokens of one request.

    Args:
        sampling: the request's.
        seed: of its random numbers.
    """

    def __init__(self, sampling: SamplingParams, seed: int) -> None:
        self._sampling, self._seed = sampling, seed
        self._logits: Floats | None = None
        self._place = 0

    def chosen_from(self, logits: Floats, place: int) -> None:
        """Remembers the logits that the next token to report was chosen from.

        Args:
            logits: float32 [V], with penalties and masks applied.
            place: position in the generated text, from 0.
        """
        self._logits, self._place = logits, place

    def of(self, token: int) -> TokenLogprob:
        """The token, with its log probability and those of the likeliest tokens, from the logits it was chosen from."""
        top = self._sampling.logprobs or 0
        if self._sampling.greedy or self._logits is None:
            return TokenLogprob(token, 0.0, ((token, 0.0),)[:top])
        tokens, weights = remaining(self._logits, self._sampling, self._seed, self._place)
        p = weights.astype(np.float64) / weights.sum(dtype=np.float64)
        own = float(p[tokens == token].sum()) or float(p[-1])  # 0: rounding at the edge of a filter
        best = [(int(other), math.log(value)) for other, value in zip(tokens[:top], p[:top].tolist(), strict=True) if value > 0]
        return TokenLogprob(token, math.log(own), tuple(best))
