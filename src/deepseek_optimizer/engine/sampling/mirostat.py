"""Mirostat: chooses tokens such that their information content stays near a target. No torch.

Basu et al. 2021, "Mirostat: A Neural Text Decoding Algorithm that Directly Controls Perplexity", in the form of llama.cpp
(`llama_sampler_mirostat_apply` and `llama_sampler_mirostat_v2_apply` in src/llama-sampler.cpp), which starts at mu = 2 tau and
estimates the exponent of Zipf's law in version 1 from the 100 likeliest tokens.

mu depends on all tokens that were chosen before. With drafts, each position's token is chosen exactly once and always kept, so
mu, and the text, are those without drafts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...backends.sampling import Floats, draw_from

_LIKELIEST = 100  # tokens from which version 1 estimates the exponent


class Mirostat:
    """State of one request.

    Args:
        version: 1 or 2.
        tau: target in bits per token.
        eta: learning rate.
        vocab_size: number of logits.

    Attributes:
        mu: maximum information content, in bits, that the next token should have.
    """

    def __init__(self, version: int, tau: float, eta: float, vocab_size: int) -> None:
        self._first, self._tau, self._eta, self._vocab_size = version == 1, tau, eta, vocab_size
        self.mu = 2 * tau

    def draw(self, scaled: Floats, u: float) -> int:
        """Samples a token and adapts mu to it.

        Args:
            scaled: logits divided by the temperature, float32 [V]; at least one is finite.
            u: in [0, 1); selects the token.
        """
        tokens = np.flatnonzero(np.isfinite(scaled))
        tokens = tokens[np.argsort(-scaled[tokens], kind="stable")]
        weights = np.exp((scaled[tokens] - scaled[tokens[0]]).astype(np.float64))
        p = weights / weights.sum()
        keep = self._first_version(p) if self._first else self._second_version(p)
        tokens, p = tokens[:keep], p[:keep] / p[:keep].sum()
        token = draw_from(tokens, p, u)
        surprise = -np.log2(p[np.flatnonzero(tokens == token)[0]])
        self.mu -= self._eta * float(surprise - self._tau)
        return token

    def _first_version(self, p: npt.NDArray[np.float64]) -> int:
        """The number of likeliest tokens whose cross entropy under Zipf's law is mu; all if the estimate fails."""
        count = min(_LIKELIEST, len(p)) - 1
        with np.errstate(all="ignore"):
            t = np.log(np.arange(2, count + 2) / np.arange(1, count + 1))
            b = np.log(p[:count] / p[1 : count + 1])
            exponent = (t * b).sum() / (t * t).sum()
            epsilon = exponent - 1
            keep = (epsilon * np.exp2(self.mu) / (1 - float(self._vocab_size) ** -epsilon)) ** (1 / exponent)
        return max(1, int(min(keep, len(p)))) if not np.isnan(keep) else len(p)

    def _second_version(self, p: npt.NDArray[np.float64]) -> int:
        """The number of tokens with at most mu bits."""
        with np.errstate(divide="ignore"):
            return max(1, int(np.count_nonzero(-np.log2(p) <= self.mu)))
