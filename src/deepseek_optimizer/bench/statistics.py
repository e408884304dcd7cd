"""Percentiles of samples, and the standard error of a median."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# Smallest number of samples from which a percentile is reported: with fewer, it is the largest sample under another name.
MIN_SAMPLES = {95: 20, 99: 100}


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest ranks, numpy's default; of one sample, that sample."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(values: Sequence[float], more_is_better: bool = False) -> dict[str, float | None]:
    """{"n", "p50", "p90", "p95", "p99"}; p95 and p99 are None below 20 and 100 samples.

    Percentiles are taken towards the worse end: 99% of the samples reach the p99 of a speed.
    """
    sign = -1 if more_is_better else 1
    towards_worse = [sign * value for value in values]
    percentiles = {
        f"p{p}": sign * percentile(towards_worse, p) if len(values) >= MIN_SAMPLES.get(p, 1) else None for p in (50, 90, 95, 99)
    }
    return {"n": len(values), **percentiles}


def median_error(values: Sequence[float]) -> float | None:
    """Standard error of the median: sqrt(pi/2) times that of the mean, which is exact for normally distributed samples. None
    for fewer than three samples, from which it cannot be estimated."""
    if len(values) < 3:
        return None
    return math.sqrt(math.pi / 2) * statistics.stdev(values) / math.sqrt(len(values))
