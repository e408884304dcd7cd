"""Discounted Thompson sampling: which of some arms yields most per unit of what it costs, where that changes with time.

An arm's yield is a ratio of sums, so that long observations count for more than short ones. Each observation fades all earlier
ones, which also makes arms that have not been played for long uncertain again (Raj and Kalyani 2017, "Taming non-stationary
bandits"). An arm without observations is assumed to be like the first one. Does not import torch.
"""

from __future__ import annotations

import random
from math import sqrt

_PRIOR = 4
_SPREAD = 0.1  # assumed relative standard deviation of an observation before there are some
_KNOWN = 8.0  # observations that this assumption counts as


class ArmValues:
    """Estimates of the arms.

    Args:
        arms: their number. Arm 0 is the one that others are compared with.
        fading: weight of the previous observations after each new one.
    """

    def __init__(self, arms: int, fading: float) -> None:
        self._fading = fading
        self._gains, self._costs, self._counts = [0.0] * arms, [0.0] * arms, [0.0] * arms
        self._squares, self._weight = _KNOWN * _SPREAD**2, _KNOWN

    def add(self, arm: int, gain: float, cost: float) -> None:
        """Adds an observation: what an arm has yielded, and what it has cost (above 0)."""
        known = self.ratio(arm)
        for values in (self._gains, self._costs, self._counts):
            values[:] = [self._fading * value for value in values]
        self._gains[arm] += gain
        self._costs[arm] += cost
        self._counts[arm] += 1
        if known:
            deviation = gain / cost / known - 1
            self._squares = self._fading * self._squares + deviation * deviation
            self._weight = self._fading * self._weight + 1

    def count(self, arm: int) -> float:
        """Returns the number of observations of an arm, less what has faded."""
        return self._counts[arm]

    def ratio(self, arm: int) -> float | None:
        """Returns an arm's yield per unit of cost; None without observations."""
        return self._gains[arm] / self._costs[arm] if self._costs[arm] else None

    def relative(self, arm: int) -> float:
        """Returns an arm's yield as a multiple of arm 0's, shrunk to 1 while there are few observations."""
        own, first = self.ratio(arm), self.ratio(0)
        if arm == 0 or own is None or not first:
            return 1.0
        return (self._counts[arm] * own / first + _PRIOR) / (self._counts[arm] + _PRIOR)

    def sample(self, rng: random.Random) -> int:
        """Returns the best arm by one sample of what each may yield."""
        spread = sqrt(self._squares / self._weight)
        drawn = [rng.gauss(self.relative(n), spread / sqrt(self._counts[n] + _PRIOR)) for n in range(len(self._counts))]
        return max(range(len(drawn)), key=lambda n: drawn[n])
