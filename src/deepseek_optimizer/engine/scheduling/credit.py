"""Bounds what decisions that are being tried may cost, compared with decisions that are known.

Others than the known ones must be covered by a credit in seconds. It starts at a few decisions, grows by a share of the elapsed
time and by the time that others have saved, up to a maximum, and what they have lost is subtracted. So by what is measured, all
losses together are at most the initial credit, that share of the time, and one decision. Wu et al. 2016 ("Conservative
bandits") bound losses the same way. Does not import torch.
"""

from __future__ import annotations


class Credit:
    """
    Args:
        share: of the elapsed time, that may be lost.
        first, most: initial and largest credit, in decisions of mean length.
    """

    def __init__(self, share: float, first: float, most: float) -> None:
        self._share, self._first, self._most = share, first, most
        self._seconds = self._mean = 0.0

    @property
    def seconds(self) -> float:
        """The credit; while it is not positive, only the known decision may be made."""
        return self._seconds

    @property
    def left(self) -> bool:
        """Whether others may be tried."""
        return self._mean == 0.0 or self._seconds > 0

    def add(self, seconds: float, saved: float) -> None:
        """Adds the outcome of a decision.

        Args:
            seconds: how long it has been in force, above 0.
            saved: seconds that it has saved compared with the known decision; negative: lost. A known decision may save
                something, too, if it finds less to do than it would have left.
        """
        if self._mean == 0.0:
            self._mean, self._seconds = seconds, self._first * seconds
        self._mean += 0.05 * (seconds - self._mean)
        self._seconds = min(self._seconds + self._share * seconds + saved, self._most * self._mean)
