"""The number of drafts of a request in a shared batch, chosen by one bandit per request. Does not import torch.

A step of the batch with R rows takes t(R) seconds, as measured, and generates one token for each of B requests, so a token is
worth t(R) / B. With n drafts a request gets E(n) - 1 additional tokens (see `Acceptance`), which cost t(R + n) - t(R) and the
time of drafting. The bandit chooses the n with the largest gain (worth less cost), if it is positive; for a single request
that is the largest E(n) / t. If it chooses none, it tries drafts again at intervals, which grow while they are rejected.

As in `draft_length`, drafts must be covered by a credit, which grows by a share of the elapsed time and by the time that drafts
have saved, so that no request loses more than that share.
"""

from __future__ import annotations

from ..scheduling.step_times import StepTimes
from .acceptance import Acceptance

SHARE = 0.01  # maximum share of the elapsed time that rejected drafts may cost
_FIRST, _MAX = 1.0, 4.0  # initial and maximum credit, in plain steps
_SOON, _LATER = 8, 128  # minimum and maximum number of steps before drafts are tried again; doubles each time
_MARGIN = 0.05  # minimum expected gain in steps, above measurement noise


class DraftBandit:
    """Bandit of one request and one proposer.

    Args:
        max_drafts: maximum number of drafts in a step.
        prior: assumed acceptance rate of the first draft before any has been tried.
    """

    def __init__(self, max_drafts: int, prior: float = 0.7) -> None:
        self.max_drafts, self._acceptance = max_drafts, Acceptance(max_drafts, prior)
        self._credit: float | None = None
        self._chances, self._wait = 0, _SOON
        self.proposed = self.accepted = 0

    def choose(self, max_drafts: int, rows: int, sequences: int, times: StepTimes, proposing: float = 0.0) -> int:
        """Returns the number of drafts for the next step.

        Args:
            max_drafts: maximum number of drafts in this step.
            rows, sequences: number of rows and sequences in the step without drafts.
            times: measured step times.
            proposing: seconds to propose one draft.
        """
        max_drafts, plain = min(max_drafts, self.max_drafts), times.decode(rows)
        if max_drafts <= 0 or plain is None:
            return 0
        if self._credit is None:
            self._credit = _FIRST * plain / sequences
        expected, token = self._acceptance.expected(max_drafts), plain / sequences

        def cost(n: int) -> float:
            return max((times.decode(rows + n) or plain) - plain, 0.0) + n * proposing

        gains = [(expected[n] - 1) * token - cost(n) for n in range(max_drafts + 1)]
        best = max(range(max_drafts + 1), key=lambda n: gains[n])
        if gains[best] < _MARGIN * token:
            self._chances += 1
            if self._chances < self._wait:
                return 0
            self._chances, self._wait, best = 0, min(2 * self._wait, _LATER), max(1, best)
        while best and cost(best) > self._credit:
            best -= 1
        return best

    def record(self, drafted: int, accepted: int, cost: float, token: float) -> None:
        """Adds the outcome of a step.

        Args:
            drafted, accepted: number of drafts, and of those accepted.
            cost: seconds that the drafts took.
            token: seconds that a token is worth.
        """
        self._acceptance.count(drafted, accepted)
        self.proposed, self.accepted = self.proposed + drafted, self.accepted + accepted
        if accepted:
            self._wait = _SOON
        if self._credit is not None:
            self._credit = min(self._credit + accepted * token - cost + SHARE * token, _MAX * token)
