"""Measured step times, by the number of decoding rows, and the time per prompt token. Does not import torch."""

from __future__ import annotations

_FADING = 0.8  # weight of the previous mean
_MEMORY = 512  # steps after which a measurement that was not repeated is discarded: it may be an outlier, and contexts grow


class StepTimes:
    """Exponential moving averages of step times.

    Disturbances only make steps slower, so a sample counts as at most twice the mean, and the mean of the first two is the
    smaller one.
    """

    def __init__(self) -> None:
        self._decode: dict[int, float] = {}
        self._seen: dict[int, int] = {}  # step of the latest measurement, by number of rows
        self._once: set[int] = set()  # numbers of rows that were measured once
        self._steps = 0
        self._prompt: float | None = None

    def add(self, seconds: float, rows: int, prompt: int) -> None:
        """Adds a measured step.

        Args:
            seconds: duration of the step.
            rows: number of decoding rows.
            prompt: number of prompt tokens.
        """
        self._steps += 1
        if prompt == 0:
            if rows:
                self._decode[rows] = self._mean(rows, seconds)
                self._seen[rows] = self._steps
                self._forget()
            return
        line = self.line() or (0.0, 0.0)
        plain = (self.decode(rows) or 0.0) if rows else line[0]
        self._prompt = _mixed(self._prompt, max(seconds - plain, seconds * 0.1) / prompt)

    def _mean(self, rows: int, seconds: float) -> float:
        """The mean of a number of rows with a further measurement."""
        mean = self._decode.get(rows)
        if mean is None:
            self._once.add(rows)
        elif rows in self._once:
            self._once.remove(rows)
            return min(mean, seconds)
        return _mixed(mean, seconds)

    def _forget(self) -> None:
        for rows in [n for n, when in self._seen.items() if self._steps - when > _MEMORY]:
            del self._seen[rows], self._decode[rows]
            self._once.discard(rows)

    @property
    def prompt(self) -> float | None:
        """Seconds per prompt token; None before the first measurement."""
        return self._prompt

    def decode(self, rows: int) -> float | None:
        """Returns the seconds of a step with `rows` decoding rows and no prompt tokens; None before the first measurement.

        Between measured numbers of rows it is interpolated, outside them it follows `line`.
        """
        if not self._decode:
            return None
        if rows in self._decode:
            return self._decode[rows]
        below = max((n for n in self._decode if n < rows), default=None)
        above = min((n for n in self._decode if n > rows), default=None)
        if below is None or above is None:
            a, b = self.line() or (0.0, 0.0)
            return a + b * rows
        at_a, at_b = self._decode[below], self._decode[above]
        return at_a + (at_b - at_a) * (rows - below) / (above - below)

    def line(self) -> tuple[float, float] | None:
        """Returns (a, b), not negative, of the least-squares line a + b * rows through the measurements; None without any."""
        points = dict(self._decode)  # a copy: metrics are read on another thread
        if not points:
            return None
        n = len(points)
        mean_x, mean_y = sum(points) / n, sum(points.values()) / n
        spread = sum((x - mean_x) ** 2 for x in points)
        slope = sum((x - mean_x) * (y - mean_y) for x, y in points.items()) / spread if spread else 0.0
        slope = min(max(slope, 0.0), mean_y / mean_x)
        return mean_y - slope * mean_x, slope


def _mixed(mean: float | None, sample: float) -> float:
    return sample if mean is None else _FADING * mean + (1 - _FADING) * min(sample, 2 * mean)
