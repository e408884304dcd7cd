"""Measured costs of steps: seconds by the number of sequences and of draft rows."""

from __future__ import annotations

import statistics
from collections import deque

_KEPT = 5  # number of latest samples kept; older ones are from other context lengths
_UNKNOWN = 0.5  # assumed cost of one more row per sequence before any is measured, as a fraction of a plain step


class StepCosts:
    """Costs of the steps of one request; they depend on its context length."""

    def __init__(self) -> None:
        self._samples: dict[tuple[int, int], deque[float]] = {}
        self._medians: dict[int, dict[int, float]] = {}

    def add(self, sequences: int, drafted: int, seconds: float) -> None:
        """Adds a measured round.

        Args:
            sequences: number of sequences.
            drafted: number of drafts verified, over all sequences.
            seconds: duration of the round.
        """
        samples = self._samples.setdefault((sequences, drafted), deque(maxlen=_KEPT))
        samples.append(seconds)
        self._medians.setdefault(sequences, {})[drafted] = _middle(samples)

    def samples(self, sequences: int, drafted: int) -> int:
        """Returns the number of samples kept for such rounds."""
        return len(self._samples.get((sequences, drafted), ()))

    def seconds(self, sequences: int, drafted: int) -> float | None:
        """Returns the cost of a round in seconds; None before a plain step has been measured.

        It is the median of the samples, or the minimum of fewer than three, since disturbances only make steps slower. For
        other numbers of drafts it is interpolated or extrapolated linearly.
        """
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
