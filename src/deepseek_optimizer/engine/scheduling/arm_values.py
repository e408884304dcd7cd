"""Discounted Thompson sampling: which of some arms yields most per unit of what it costs, where that changes with time.

What each arm should yield is predicted; learned is by what factor the predictions are wrong. The factor is a ratio of sums, so
that long observations count for more than short ones. Each observation fades all earlier ones, which also makes arms that have
not been played for long uncertain again (Raj and Kalyani 2017, "Taming non-stationary bandits"). Without observations, the
prediction of an arm is assumed to be wrong by the same factor as that of the first one. Does not import torch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import sqrt

_PRIOR = 32  # observations that the assumption counts as
_SPREAD = 0.02  # its relative standard deviation


class ArmValues:
    """Factors by which predictions are wrong.

    Args:
        arms: their number. Arm 0 is the one that others are compared with.
        fading: weight of the previous observations after each new one.
    """

    def __init__(self, arms: int, fading: float) -> None:
        self._fading = fading
        self._predicted, self._costs, self._counts = [0.0] * arms, [0.0] * arms, [0.0] * arms

    def add(self, arm: int, predicted: float, cost: float) -> None:
        """Adds an observation: what an arm should have cost, and what it has cost (above 0)."""
        for values in (self._predicted, self._costs, self._counts):
            values[:] = [self._fading * value for value in values]
        self._predicted[arm] += predicted
        self._costs[arm] += cost
        self._counts[arm] += 1

    def count(self, arm: int) -> float:
        """Returns the number of observations of an arm, less what has faded."""
        return self._counts[arm]

    def ratio(self, arm: int) -> float | None:
        """Returns an arm's predicted cost as a multiple of its cost; None without observations."""
        return self._predicted[arm] / self._costs[arm] if self._costs[arm] else None

    def relative(self, arm: int) -> float:
        """Returns an arm's ratio as a multiple of arm 0's, shrunk to 1 while there are few observations."""
        own, first = self.ratio(arm), self.ratio(0)
        if arm == 0 or own is None or not first:
            return 1.0
        return (self._counts[arm] * own / first + _PRIOR) / (self._counts[arm] + _PRIOR)

    def sample(self, rng: random.Random, predicted: Sequence[float]) -> int:
        """Returns the cheapest arm by one sample of what each may cost.

        Args:
            rng: draws the sample.
            predicted: what each arm should cost.
        """
        drawn = []
        for arm, cost in enumerate(predicted):
            spread = _SPREAD * sqrt(_PRIOR / (self._counts[arm] + _PRIOR))
            drawn.append(cost / max(rng.gauss(self.relative(arm), spread), _SPREAD))
        return min(range(len(drawn)), key=lambda arm: drawn[arm])
