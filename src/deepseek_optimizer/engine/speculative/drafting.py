"""Which drafts each request of a step gets: its proposers in turn, each under a bandit of its own. No torch.

The text itself (prompt lookup) is asked first: it costs nothing. Where it has nothing to say, or its drafts do not hold in this
text, the model's own layers or a draft model are asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ..draft import Draft
from ..running import Running
from ..scheduling.step_times import StepTimes
from .bandit import DraftBandit
from .base import Proposer

_FADING = 0.9
_PRIORS = {"prompt_lookup": 0.4}


class Drafting:
    """
    Args:
        proposers: in order of asking, with the drafts of a round that each may make. They draft for certain (`Draft.q` None).
        times: of the engine's steps.
    """

    def __init__(
        self,
        proposers: list[tuple[Proposer, int]],
        times: StepTimes,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._proposers, self._times, self._clock = proposers, times, clock
        self._bandits: dict[int, list[DraftBandit]] = {}
        self._seconds = {p.name: 0.0 for p, _ in proposers}  # that a draft takes to make
        self._asked: dict[int, int] = {}  # whose drafts a request has in this step
        self.proposed = self.held = 0

    @property
    def wants_states(self) -> bool:
        """Whether a proposer follows the model's hidden states."""
        return any(p.wants_states for p, _ in self._proposers)

    def wanted(self, running: list[Running]) -> dict[Running, int]:
        """For how many drafts each needs room at most."""
        self._asked.clear()
        found, rows, sequences = {}, len(running), len(running)
        for r in running:
            if r.request.drafts is False or r.room < 2:
                continue
            bandits = self._bandits.get(r.sequence.index)
            if bandits is None:
                bandits = [DraftBandit(most, _PRIORS.get(p.name, 0.7)) for p, most in self._proposers]
                self._bandits[r.sequence.index] = bandits
            for n, ((proposer, _), bandit) in enumerate(zip(self._proposers, bandits, strict=True)):
                if not proposer.ready(r.sequence):
                    continue
                count = bandit.choose(r.room - 1, rows, sequences, self._times, self._seconds[proposer.name])
                if count:
                    found[r], self._asked[r.sequence.index] = count, n
                    break
        return found

    def propose(self, room: dict[Running, int]) -> dict[Running, list[int]]:
        """Drafts of those that have room for them in the cache."""
        found: dict[Running, list[int]] = {}
        for n, (proposer, _) in enumerate(self._proposers):
            asked = [r for r in room if self._asked.get(r.sequence.index) == n]
            if not asked:
                continue
            begun = self._clock()
            drafts: list[Draft] = proposer.propose([r.sequence for r in asked], [room[r] for r in asked])
            count = sum(len(d.tokens) for d in drafts)
            if count:
                each, old = (self._clock() - begun) / count, self._seconds[proposer.name]
                self._seconds[proposer.name] = each if not old else _FADING * old + (1 - _FADING) * min(each, 2 * old)
            found.update({r: d.tokens for r, d in zip(asked, drafts, strict=True)})
        return found

    def record(self, outcomes: list[tuple[Running, int, int]]) -> None:
        """(request, drafts verified, drafts that held) of all that decoded in a step."""
        sequences = len(outcomes)
        plain = self._times.decode(sequences)
        for r, drafted, held in outcomes:
            self.proposed, self.held = self.proposed + drafted, self.held + held
            bandits = self._bandits.get(r.sequence.index)
            if bandits is None or plain is None:
                continue
            asked = self._asked.get(r.sequence.index)
            with_drafts = self._times.decode(sequences + drafted) or plain
            for n, ((proposer, _), bandit) in enumerate(zip(self._proposers, bandits, strict=True)):
                if n == asked and drafted:
                    cost = max(with_drafts - plain, 0.0) + drafted * self._seconds[proposer.name]
                    bandit.record(drafted, held, cost, plain / sequences)
                else:
                    bandit.record(0, 0, 0.0, plain / sequences)

    def follow(self, running: Running, states: object) -> None:
        """Hidden states of tokens that came into its cache."""
        for proposer, _ in self._proposers:
            if proposer.wants_states:
                proposer.follow(running.sequence, states)

    def forget(self, running: Running, *, ended: bool) -> None:
        """It has lost its cache, or ended."""
        for proposer, _ in self._proposers:
            proposer.forget(running.sequence)
        if ended:
            self._bandits.pop(running.sequence.index, None)
