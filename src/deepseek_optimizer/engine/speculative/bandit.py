"""How many drafts a request gets in a step it shares with others: a bandit of its own for each request. No torch.

A step of the batch with R rows takes t(R) seconds, as measured, and brings B requests a token each: a token's worth is t(R) /
B. n drafts bring E(n) - 1 tokens more (see `Acceptance`) and cost t(R + n) - t(R), and what proposing takes. The bandit takes
the n of largest worth less cost, if it is above zero; alone in the batch that is the largest E(n) / t. What it does not take
for long it tries again now and then, later and later while it fails.

As in `gate`, drafts must be covered by a credit: a share of the time that passes and what drafts have gained, so that no
request loses more than that share by them.
"""

from __future__ import annotations

from ..scheduling.step_times import StepTimes
from .acceptance import Acceptance

SHARE = 0.01  # of the time that passes may be lost by drafts that do not hold
_FIRST, _MAX = 1.0, 4.0  # plain steps of credit, at first and at most
_SOON, _LATER = 8, 128  # chances that go by before drafts are tried again: doubles from the first to the second
_MARGIN = 0.05  # of a step that drafts must promise, so that noise does not choose


class DraftBandit:
    """Of one request and one proposer.

    Args:
        most: drafts at most.
        prior: how likely its first draft is taken to hold.
    """

    def __init__(self, most: int, prior: float = 0.7) -> None:
        self.most, self._acceptance = most, Acceptance(most, prior)
        self._credit: float | None = None
        self._chances, self._wait = 0, _SOON
        self.proposed = self.held = 0

    def choose(self, most: int, rows: int, sequences: int, times: StepTimes, proposing: float = 0.0) -> int:
        """Drafts in the next step.

        Args:
            most: that make sense here.
            rows, sequences: of the step without them.
            proposing: seconds that a draft takes to make.
        """
        most, plain = min(most, self.most), times.decode(rows)
        if most <= 0 or plain is None:
            return 0
        if self._credit is None:
            self._credit = _FIRST * plain / sequences
        expected, token = self._acceptance.expected(most), plain / sequences

        def cost(n: int) -> float:
            return max((times.decode(rows + n) or plain) - plain, 0.0) + n * proposing

        gains = [(expected[n] - 1) * token - cost(n) for n in range(most + 1)]
        best = max(range(most + 1), key=lambda n: gains[n])
        if gains[best] < _MARGIN * token:
            self._chances += 1
            if self._chances < self._wait:
                return 0
            self._chances, self._wait, best = 0, min(2 * self._wait, _LATER), max(1, best)
        while best and cost(best) > self._credit:
            best -= 1
        return best

    def record(self, drafted: int, held: int, cost: float, token: float) -> None:
        """What came of a step.

        Args:
            cost: seconds that its drafts took.
            token: seconds that a token is worth.
        """
        self._acceptance.count(drafted, held)
        self.proposed, self.held = self.proposed + drafted, self.held + held
        if held:
            self._wait = _SOON
        if self._credit is not None:
            self._credit = min(self._credit + held * token - cost + SHARE * token, _MAX * token)
