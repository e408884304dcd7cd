"""Log probabilities of a prompt's tokens, in arrays: a long prompt has many. Does not import torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..backends.sampling import Floats, largest_tokens, log_probability


class PromptLogprobs:
    """Log probabilities of the tokens of a prompt but its first, each given all tokens before it.

    They are those of the model's distribution: softmax of the logits, without temperature or filters.

    Args:
        prompt: token ids, P of them.
        top: number K of most likely tokens to report at each position, at most the size of the vocabulary.

    Attributes:
        tokens: int64 [P - 1], the prompt's tokens from the second on.
        logprobs: float64 [P - 1], their natural log probabilities.
        ranks: int64 [P - 1]; 1: the most likely token.
        top_tokens: int64 [P - 1, K], the most likely tokens, best first; ties: the lower id first.
        top_logprobs: float64 [P - 1, K].
        done: number of positions computed so far, from the first.
    """

    def __init__(self, prompt: list[int], top: int) -> None:
        self.tokens = np.array(prompt[1:], np.int64)
        count = len(self.tokens)
        self.logprobs: npt.NDArray[np.float64] = np.zeros(count, np.float64)
        self.ranks: npt.NDArray[np.int64] = np.zeros(count, np.int64)
        self.top_tokens: npt.NDArray[np.int64] = np.zeros((count, top), np.int64)
        self.top_logprobs: npt.NDArray[np.float64] = np.zeros((count, top), np.float64)
        self.done = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def complete(self) -> bool:
        """Whether all positions have been computed."""
        return self.done == len(self)

    def add(self, logits: Floats) -> bool:
        """Computes the next position.

        Args:
            logits: float32 [V], those of the token before it.

        Returns: False if the largest logit is not finite; nothing is changed then.
        """
        if not np.isfinite(logits.max()):
            return False
        at, token, top = self.done, self.tokens[self.done], self.top_tokens.shape[1]
        best = largest_tokens(logits, top) if top else np.zeros(0, np.int64)
        values = log_probability(logits, np.concatenate([[token], best]))
        self.logprobs[at], self.top_tokens[at], self.top_logprobs[at] = values[0], best, values[1:]
        self.ranks[at] = 1 + np.count_nonzero(logits > logits[token])
        self.done += 1
        return True
