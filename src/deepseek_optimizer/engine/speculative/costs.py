"""What steps cost, as measured: seconds by the number of sequences and of drafted rows beside theirs."""

from __future__ import annotations

import statistics
from collections import deque

_KEPT = 5  # samples; old ones were taken at other context lengths
_UNKNOWN = 0.5  # of a plain step, that a further row a sequence is taken to cost before any was measured


class StepCosts:
    """Of one request: another one's steps, at another context length, cost something else."""

    def __init__(self) -> None:
        self._samples: dict[tuple[int, int], deque[float]] = {}
        self._medians: dict[int, dict[int, float]] = {}

    def add(self, sequences: int, drafted: int, seconds: float) -> None:
        """A round of so many sequences, which verified so many drafts in all."""
        samples = self._samples.setdefault((sequences, drafted), deque(maxlen=_KEPT))
        samples.append(seconds)
        self._medians.setdefault(sequences, {})[drafted] = _middle(samples)

    def samples(self, sequences: int, drafted: int) -> int:
        """How many were kept."""
        return len(self._samples.get((sequences, drafted), ()))

    def seconds(self, sequences: int, drafted: int) -> float | None:
        """The median; of fewer than three the smallest, since what disturbs makes slower. Between and behind measured numbers
        of drafts along straight lines. None before a plain step was measured."""
        known = self._medians.get(sequences, {})
        if 0 not in known:
            return None
        if drafted in known:
            return known[drafted]
        if len(known) == 1:
            return known[0] * (1 + _UNKNOWN * drafted / sequences)
        below = max(n for n in known if n < drafted)
        above = min((n for n in known if n > drafted), default=None)
        if above is None:
            above, below = below, max(n for n in known if n < below)
            return max(known[above], _line(below, known[below], above, known[above], drafted))
        return _line(below, known[below], above, known[above], drafted)


def _middle(samples: deque[float]) -> float:
    return statistics.median(samples) if len(samples) > 2 else min(samples)


def _line(a: int, at_a: float, b: int, at_b: float, x: int) -> float:
    return at_a + (at_b - at_a) * (x - a) / (b - a)
