"""The batch size, chosen from measured step times (dynamic batching). Does not import torch.

A step of n sequences takes about a + b n seconds: a for reading the weights, b for the arithmetic of one sequence. Each
additional sequence raises the throughput, n / (a + b n) tokens per second, by less than the one before, while every stream
gets slower. The smallest batch size is chosen whose throughput is close to that of the largest allowed one. With a target
inter-token latency, it is the largest batch size that meets the target.
"""

from __future__ import annotations

from .step_times import StepTimes

_NEARLY = 0.97  # required fraction of the largest batch's throughput


class BatchSize:
    """Chooses the batch size.

    Args:
        low, high: the range, `batch_size_range`.
        times: measured step times.
        target: maximum inter-token latency in seconds; None: not limited.
    """

    def __init__(self, low: int, high: int, times: StepTimes, target: float | None = None) -> None:
        self.low, self.high, self.target = low, high, target
        self._times, self._most = times, high

    def limit(self, most: int) -> None:
        """Sets the largest batch size within the range for the next steps."""
        self._most = max(self.low, min(most, self.high))

    def choose(self) -> int:
        """Returns the maximum number of sequences in the batch; the largest before the first measurement."""
        line, high = self._times.line(), self._most
        if line is None:
            return high
        a, b = line
        if self.target is not None:
            fits = high if a + b * high <= self.target else int((self.target - a) / b) if b else self.low
            return max(self.low, min(high, fits))
        rate = _NEARLY * high / (a + b * high)
        return next((n for n in range(self.low, high) if n >= rate * (a + b * n)), high)
