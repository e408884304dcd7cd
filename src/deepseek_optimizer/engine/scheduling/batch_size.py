"""How many sequences run at once: dynamic batching, by measured step times. No torch.

A step of n sequences takes about a + b n seconds: a for reading the weights, b for each one's arithmetic. So each sequence more
makes the whole faster, n / (a + b n) tokens a second, but less and less, while every stream gets slower. The batch is the
smallest that has nearly the rate of the largest allowed one. With a target for the time between tokens it is the largest that
keeps to it.
"""

from __future__ import annotations

from .step_times import StepTimes

_NEARLY = 0.97  # of the rate of the largest batch


class BatchSize:
    """
    Args:
        low, high: the range, `batch_size_range`.
        target: seconds between a sequence's tokens at most; None: no matter.
    """

    def __init__(self, low: int, high: int, times: StepTimes, target: float | None = None) -> None:
        self.low, self.high, self.target = low, high, target
        self._times = times

    def choose(self) -> int:
        """Sequences to run at most; all that are allowed until something is measured."""
        line = self._times.line()
        if line is None:
            return self.high
        a, b = line
        if self.target is not None:
            fits = self.high if a + b * self.high <= self.target else int((self.target - a) / b) if b else self.low
            return max(self.low, min(self.high, fits))
        rate = _NEARLY * self.high / (a + b * self.high)
        return next((n for n in range(self.low, self.high) if n >= rate * (a + b * n)), self.high)
