"""How many drafts a round verifies: as many as pay, by what was measured, and never at a loss for long.

With acceptance a_j of the j-th draft (given that those before it held) a round of n drafts yields
E(n) = 1 + a_1 + a_1 a_2 + ... + a_1 ... a_n tokens (Leviathan et al. 2023, section 3.1, with unequal a_j) and takes c(n)
seconds, drafting included. n = 0 is plain decoding. The gate chooses the n of largest E(n) / c(n).

Acceptances are counted with weights that fade, so that a change in the text is noticed; before a position was tried it is taken
to be as the one before it. Costs are medians.

Whatever the estimates say, a round with drafts must be covered by a credit, in seconds: one plain step at first, a small share
of the time that passes, and what drafts have saved so far, up to a few steps. What drafts lose is taken from it. So against
plain decoding no more than FIRST steps and SHARE of the time can be lost, whatever is accepted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .acceptance import Acceptance
from .costs import StepCosts

FIRST, SHARE, MAX = 0.8, 0.012, 4.0  # plain steps of credit at first and at most; share of the time that adds to it
_BETTER = 1.02  # that drafts must promise over plain decoding
_WARM = 2  # plain rounds before the first drafts
_SOON, _LATER = 4, 32  # rounds after which something beside the best is measured again: doubles from the first to the second


@dataclass(frozen=True)
class SpeculationReport:
    """What drafts did for a request.

    Attributes:
        rounds: steps of the model; `drafted` of them verified drafts.
        accepted_length: tokens that a sequence got in a round with drafts of its own, on average: 1 where no draft ever held.
        acceptance: of each position, the share of drafts that held among those whose forerunners held.
        proposed: how many drafts each of these shares is of.
        chosen: (drafts, rounds) in order of time: so many rounds in a row were allowed so many drafts.
        speedup: plain decoding's time for the same tokens, by its median step, over the time taken.
    """

    rounds: int
    drafted: int
    accepted_length: float
    acceptance: tuple[float, ...]
    proposed: tuple[int, ...]
    chosen: tuple[tuple[int, int], ...]
    speedup: float


class Gate:
    """Of one request, or of a batch of them that run together. Knows no clock: it is told what rounds took.

    Args:
        most: drafts a sequence, at most.
        fixed: always that many, whether or not they pay.
    """

    def __init__(self, most: int, *, fixed: bool = False) -> None:
        self.most, self.fixed, self.costs = most, fixed, StepCosts()
        self._acceptance = Acceptance(most)
        self._accepted, self._proposed = [0] * most, [0] * most  # all
        self._credit: float | None = None
        self._since, self._wait, self._turn = 0, _SOON, 0  # rounds since the best was left for another, and until it will be
        self._chosen: list[tuple[int, int]] = []
        self._rounds = self._drafted = self._lengths = self._with = 0
        self._seconds = self._plain = 0.0

    def choose(self, sequences: int, most: int | None = None) -> int:
        """Drafts a sequence in the next round.

        Args:
            sequences: that take part.
            most: fewer than the gate's own, where the end is near.
        """
        most = self.most if most is None else min(most, self.most)
        chosen = most if self.fixed or most <= 0 else self._choice(sequences, most)
        if self._chosen and self._chosen[-1][0] == chosen:
            self._chosen[-1] = (chosen, self._chosen[-1][1] + 1)
        else:
            self._chosen.append((chosen, 1))
        return chosen

    def _choice(self, sequences: int, most: int) -> int:
        plain = self.costs.seconds(sequences, 0)
        if plain is None or self.costs.samples(sequences, 0) < _WARM:
            return 0
        if self._credit is None:
            self._credit = FIRST * plain
        expected = self._acceptance.expected(most)
        rates = [1 / plain, *(expected[n] / self._cost(sequences, n) for n in range(1, most + 1))]
        drafts = max(range(1, most + 1), key=lambda n: rates[n])
        best = drafts if rates[drafts] > _BETTER * rates[0] else 0
        self._since += 1
        if self._since >= self._wait:
            best = self._beside(best, drafts, most)
            self._since, self._wait, self._turn = 0, min(2 * self._wait, _LATER), self._turn + 1
        while best and self._cost(sequences, best) - plain > self._credit:
            best -= 1
        return best

    def _beside(self, best: int, drafts: int, most: int) -> int:
        """Another number than the best, of which too little may be known by now; `drafts`: the best above none."""
        if best == 0:
            return drafts
        return (min(best + 1, most), 0, best - 1)[self._turn % 3]

    def _cost(self, sequences: int, n: int) -> float:
        """Of a round; no less than a plain step's, whatever disturbed that."""
        found, plain = self.costs.seconds(sequences, sequences * n), self.costs.seconds(sequences, 0)
        assert found is not None and plain is not None  # a plain step was measured
        return max(found, plain)

    def record(self, seconds: float, outcomes: Iterable[tuple[int, int]]) -> None:
        """What a round took, and of each sequence (drafts verified, drafts that held)."""
        outcomes = list(outcomes)
        sequences, drafted = len(outcomes), sum(n for n, _ in outcomes)
        self.costs.add(sequences, drafted, seconds)
        tokens = 1 + sum(held for _, held in outcomes) / sequences
        for n, held in outcomes:
            self._count(n, held)
        plain = self.costs.seconds(sequences, 0)
        self._rounds += 1
        self._drafted += drafted > 0
        if plain is not None:
            self._seconds += seconds
            self._plain += tokens * plain
            if self._credit is not None:
                saved = tokens * plain - seconds if drafted else 0.0
                self._credit = min(self._credit + saved + SHARE * seconds, MAX * plain)

    def _count(self, drafted: int, held: int) -> None:
        self._lengths += (1 + held) * (drafted > 0)
        self._with += drafted > 0
        self._acceptance.count(drafted, held)
        for j in range(min(drafted, held + 1)):  # those behind a draft that fell say nothing
            self._accepted[j] += j < held
            self._proposed[j] += 1

    def report(self) -> SpeculationReport:
        """So far."""
        return SpeculationReport(
            rounds=self._rounds,
            drafted=self._drafted,
            accepted_length=self._lengths / self._with if self._with else 1.0,
            acceptance=tuple(a / n if n else 0.0 for a, n in zip(self._accepted, self._proposed, strict=True)),
            proposed=tuple(self._proposed),
            chosen=tuple(self._chosen),
            speedup=self._plain / self._seconds if self._seconds else 1.0,
        )
