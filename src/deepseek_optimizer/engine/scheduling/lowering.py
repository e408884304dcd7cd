"""When requests start at the lowest quality that they allow (`Request.min_quality`): while others wait. Does not import torch.

The rule: as soon as a request has waited longer than a limit for its start, or one was preempted, requests that start are
lowered. They are no longer once all waits have been below half of the limit for four times the limit: a queue that has just
become shorter because requests were lowered does not end it. Waits and preemptions of the lowest priority, such as those of
batches, do not count, since these requests are meant to wait; they are lowered with the others. A request keeps the quality
that it started with, so that its whole answer, and every block of the cache that it shares, has one quality.
"""

from __future__ import annotations

from collections.abc import Iterable

from ...backends.qualities import EXACT
from ..running import Running

_CALM = 0.5  # of the limit: waits below it are short
_HOLD = 4.0  # times the limit: how long waits must be short


class Lowering:
    """Chooses the quality of requests that have not started.

    Args:
        limit: seconds that a request may wait for its start before others are lowered.

    Attributes:
        active: whether requests that start now are lowered.
    """

    def __init__(self, limit: float) -> None:
        self.limit, self.active = limit, False
        self._preemptions = 0
        self._calm_since: float | None = None

    def choose(self, waiting: Iterable[Running], preemptions: int, now: float) -> None:
        """Sets the quality of the waiting requests that have not started.

        Args:
            waiting: the requests.
            preemptions: number of preemptions so far, of requests that are not meant to wait.
            now: time of the engine's clock.
        """
        new = [r for r in waiting if r.started is None and not r.preempted]
        waits = (now - r.arrived for r in new if not r.request.patient)
        self._update(max(waits, default=0.0), preemptions, now)
        for r in new:
            quality = r.request.floor if self.active else r.request.quality or EXACT
            if r.sequence.quality != quality:
                r.sequence.quality = quality
                r.keys, r.restored = [], False  # of another quality's blocks

    def _update(self, longest: float, preemptions: int, now: float) -> None:
        if longest > self.limit or preemptions > self._preemptions:
            self.active, self._calm_since = True, None
        elif longest > _CALM * self.limit:
            self._calm_since = None
        elif self.active:
            self._calm_since = now if self._calm_since is None else self._calm_since
            self.active = now - self._calm_since < _HOLD * self.limit
        self._preemptions = preemptions
