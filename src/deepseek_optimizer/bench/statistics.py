"""Percentiles of samples, and how far a median may be off."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest ranks, as numpy's default; of one sample, that sample."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(values: Sequence[float], more_is_better: bool = False) -> dict[str, float]:
    """p50, p90 and p99. Percentiles go towards the worse end: the p99 of a speed is what 99% of the samples reach."""
    sign = -1 if more_is_better else 1
    return {f"p{p}": sign * percentile([sign * v for v in values], p) for p in (50, 90, 99)}


def median_error(values: Sequence[float]) -> float | None:
    """Standard error of the median: sqrt(pi/2) times that of the mean (exact for normal samples). None below three samples,
    which cannot tell."""
    if len(values) < 3:
        return None
    return math.sqrt(math.pi / 2) * statistics.stdev(values) / math.sqrt(len(values))
