"""The number of drafts in a round, chosen from measurements to maximize speed, with bounded losses.

If the j-th draft is accepted with probability a_j (given that those before it were), a round of n drafts yields
E(n) = 1 + a_1 + a_1 a_2 + ... + a_1 ... a_n tokens (Leviathan et al. 2023, section 3.1, with unequal a_j) and takes c(n)
seconds including drafting; n = 0 is plain decoding. The controller chooses the n with the largest E(n) / c(n).

Acceptance rates are estimated from exponentially decayed counts, which follow changes in the text; a position that has not been
tried is assumed to have the rate of the position before it. Costs are medians.

Independently of the estimates, a round with drafts must be covered by a credit in seconds. It starts at FIRST plain steps and
grows by a small share of the elapsed time and by the time that drafts have saved, up to MAX steps; losses are subtracted.
Compared with plain decoding, at most FIRST steps and SHARE of the time can be lost, whatever is accepted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .acceptance import Acceptance
from .costs import StepCosts

FIRST, SHARE, MAX = 0.8, 0.012, 4.0  # initial credit in plain steps, share of the elapsed time added, maximum credit in steps
_BETTER = 1.02  # minimum expected speedup of drafts over plain decoding
_WARM = 2  # plain rounds before the first drafts
_SOON, _LATER = 4, 128  # minimum and maximum number of rounds between trials of other numbers of drafts; doubles each time
_AT_ONCE = 16  # maximum number of rounds with drafts in a row
_SAMPLE = 4  # plain rounds that are measured together, between rounds with drafts


@dataclass(frozen=True)
class SpeculationReport:
    """Statistics of speculative decoding for a request.

    Attributes:
        rounds: number of steps of the model.
        drafted: number of steps that verified drafts.
        accepted_length: mean number of tokens per sequence and round with drafts; 1 if no draft was accepted.
        acceptance: acceptance rate of each position, among drafts whose predecessors were accepted.
        proposed: number of drafts that each of these rates is from.
        chosen: (drafts, rounds) in chronological order: the number of drafts allowed, and for how many rounds in a row.
        speedup: time that plain decoding would take for the same tokens, by its median step, divided by the time taken.
    """

    rounds: int
    drafted: int
    accepted_length: float
    acceptance: tuple[float, ...]
    proposed: tuple[int, ...]
    chosen: tuple[tuple[int, int], ...]
    speedup: float


class DraftLengthController:
    """Chooses the number of drafts for one request, or for a batch of requests that run together.

    Args:
        max_drafts: maximum number of drafts per sequence and round.
        fixed: always use that number, whether or not it is faster.

    Attributes:
        plain_rounds: after `choose` has returned 0, for how many rounds in a row that holds.
        drafted_rounds: the same after it has returned another number.
    """

    def __init__(self, max_drafts: int, *, fixed: bool = False) -> None:
        self.max_drafts, self.fixed, self.costs = max_drafts, fixed, StepCosts()
        self._acceptance = Acceptance(max_drafts)
        self._accepted, self._proposed = [0] * max_drafts, [0] * max_drafts  # all
        self._credit: float | None = None
        self.plain_rounds = self.drafted_rounds = 1
        self._since, self._wait, self._turn = 0, _SOON, 0  # rounds since the last trial, and until the next
        self._chosen: list[tuple[int, int]] = []
        self._rounds = self._drafted = self._lengths = self._with = 0
        self._seconds = self._plain = 0.0

    def choose(self, sequences: int, max_drafts: int | None = None) -> int:
        """Returns the number of drafts per sequence for the next round.

        Args:
            sequences: number of sequences in the round.
            max_drafts: limit for this round, such as near the end of the text; None: `self.max_drafts`.
        """
        max_drafts = self.max_drafts if max_drafts is None else min(max_drafts, self.max_drafts)
        self.plain_rounds, self.drafted_rounds = 1, _AT_ONCE if self.fixed else 1
        chosen = max_drafts if self.fixed or max_drafts <= 0 else self._choice(sequences, max_drafts)
        if self._chosen and self._chosen[-1][0] == chosen:
            self._chosen[-1] = (chosen, self._chosen[-1][1] + 1)
        else:
            self._chosen.append((chosen, 1))
        return chosen

    def _choice(self, sequences: int, max_drafts: int) -> int:
        self.plain_rounds = _SAMPLE
        plain = self.costs.seconds(sequences, 0)
        if plain is None or self.costs.samples(sequences, 0) < _WARM:
            return 0
        if self._credit is None:
            self._credit = FIRST * plain
        expected = self._acceptance.expected(max_drafts)
        rates = [1 / plain, *(expected[n] / self._cost(sequences, n) for n in range(1, max_drafts + 1))]
        drafts = max(range(1, max_drafts + 1), key=lambda n: rates[n])
        best = drafts if rates[drafts] > _BETTER * rates[0] else 0
        self._since += 1
        slower, tried = not best, self._since >= self._wait
        if tried:
            best = self._trial(best, drafts, max_drafts)
            self._since, self._wait, self._turn = 0, min(2 * self._wait, _LATER), self._turn + 1
        if slower:
            self.plain_rounds = self._wait - self._since  # until the next trial
        while best and self._cost(sequences, best) - plain > self._credit:
            best -= 1
        if best and not tried:  # as many as the credit covers if no draft is accepted
            loss = self._cost(sequences, best) - plain
            covered = _AT_ONCE if _AT_ONCE * loss <= self._credit else int(self._credit / loss)
            self.drafted_rounds = max(1, min(covered, self._wait - self._since))
        return best

    def _trial(self, best: int, drafts: int, max_drafts: int) -> int:
        """Returns another number of drafts to measure again; `drafts` is the best number above 0."""
        if best == 0:
            return drafts
        return (min(best + 1, max_drafts), 0, best - 1)[self._turn % 3]

    def _cost(self, sequences: int, n: int) -> float:
        """Returns the cost of a round with n drafts per sequence, at least that of a plain step."""
        seconds, plain = self.costs.seconds(sequences, sequences * n), self.costs.seconds(sequences, 0)
        assert seconds is not None and plain is not None  # a plain step was measured
        return max(seconds, plain)

    def record(self, seconds: float, outcomes: Iterable[tuple[int, int]], rounds: int = 1, *, follows: bool = False) -> None:
        """Adds a round, or several plain ones.

        Args:
            seconds: duration of a round.
            outcomes: (drafts verified, drafts accepted) of each sequence.
            rounds: number of rounds; several only without drafts, at most `plain_rounds`.
            follows: whether `choose` was not called for it, since it is one of `drafted_rounds`, but not the first.
        """
        outcomes = list(outcomes)
        if (unchosen := rounds - 1 + follows) > 0:
            self._since += unchosen
            self._chosen[-1] = (self._chosen[-1][0], self._chosen[-1][1] + unchosen)
        sequences, drafted = len(outcomes), sum(n for n, _ in outcomes)
        self.costs.add(sequences, drafted, seconds)
        tokens = 1 + sum(accepted for _, accepted in outcomes) / sequences
        for n, accepted in outcomes:
            self._count(n, accepted)
        plain = self.costs.seconds(sequences, 0)
        self._rounds += rounds
        self._drafted += drafted > 0
        if plain is not None:
            self._seconds += rounds * seconds
            self._plain += rounds * tokens * plain
            if self._credit is not None:
                saved = tokens * plain - seconds if drafted else 0.0
                self._credit = min(self._credit + saved + SHARE * rounds * seconds, MAX * plain)

    def _count(self, drafted: int, accepted: int) -> None:
        self._lengths += (1 + accepted) * (drafted > 0)
        self._with += drafted > 0
        self._acceptance.count(drafted, accepted)
        for j in range(min(drafted, accepted + 1)):  # those after a rejected draft are not counted
            self._accepted[j] += j < accepted
            self._proposed[j] += 1

    def report(self) -> SpeculationReport:
        """Returns the statistics so far."""
        return SpeculationReport(
            rounds=self._rounds,
            drafted=self._drafted,
            accepted_length=self._lengths / self._with if self._with else 1.0,
            acceptance=tuple(a / n if n else 0.0 for a, n in zip(self._accepted, self._proposed, strict=True)),
            proposed=tuple(self._proposed),
            chosen=tuple(self._chosen),
            speedup=self._plain / self._seconds if self._seconds else 1.0,
        )
