"""Estimates of the acceptance rate of drafts, by position in a round. Does not import torch."""

from __future__ import annotations

_FADING, _PRIOR = 0.97, 0.7


class Acceptance:
    """Acceptance rates from exponentially decayed counts, which follow changes in the text. A position that has not been tried
    is assumed to have the rate of the position before it.

    Args:
        max_drafts: maximum number of drafts in a round.
        prior: assumed acceptance rate of the first draft before any has been tried.
    """

    def __init__(self, max_drafts: int, prior: float = _PRIOR) -> None:
        self._prior = prior
        self._accepted, self._tried = [0.0] * max_drafts, [0.0] * max_drafts

    def of(self, j: int) -> float:
        """Returns the estimate for draft j (from 0), given that those before it were accepted."""
        before = self._prior if j == 0 else self.of(j - 1)
        return (self._accepted[j] + before) / (self._tried[j] + 1)

    def expected(self, max_drafts: int) -> list[float]:
        """Returns the expected number of tokens of a round with 0 .. `max_drafts` drafts.

        It is 1 + a_1 + a_1 a_2 + ... (Leviathan et al. 2023, section 3.1).
        """
        tokens, probability = [1.0], 1.0
        for j in range(max_drafts):
            probability *= self.of(j)
            tokens.append(tokens[-1] + probability)
        return tokens

    def count(self, drafted: int, accepted: int) -> None:
        """Adds the outcome of a round. Drafts after the first rejected one are not counted.

        Args:
            drafted: number of drafts.
            accepted: number of drafts accepted.
        """
        for j in range(min(drafted, accepted + 1)):
            self._accepted[j] = self._accepted[j] * _FADING + (j < accepted)
            self._tried[j] = self._tried[j] * _FADING + 1
