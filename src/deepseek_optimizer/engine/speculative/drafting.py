"""Chooses a proposer and the number of drafts for each request in a step; each proposer has its own bandit. No torch.

Prompt lookup is tried first, since it costs nothing. If it finds nothing, or its drafts are rejected in this text, a draft
model or the model's own MTP layers are tried.
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
    """Speculative decoding in the engine.

    Args:
        proposers: (proposer, maximum number of drafts per round) in the order in which to try them. Their drafts must be
            deterministic (`Draft.q` None).
        times: measured times of the engine's steps.
        clock: returns the time in seconds.

    Attributes:
        proposed, accepted, drafts: number of draft tokens verified so far, of those accepted, and of the drafts they were in.
    """

    def __init__(
        self,
        proposers: list[tuple[Proposer, int]],
        times: StepTimes,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._proposers, self._times, self._clock = proposers, times, clock
        self._bandits: dict[int, list[DraftBandit]] = {}
        self._seconds = {p.name: 0.0 for p, _ in proposers}  # per draft
        self._chosen: dict[int, int] = {}  # sequence index -> index of its proposer in this step
        self.proposed = self.accepted = self.drafts = 0

    @property
    def wants_states(self) -> bool:
        """Whether a proposer needs the model's draft states."""
        return any(p.wants_states for p, _ in self._proposers)

    def max_drafts(self, running: list[Running]) -> dict[Running, int]:
        """Chooses a proposer for each request; returns the maximum number of drafts of each, to reserve room for."""
        self._chosen.clear()
        drafts, rows, sequences = {}, len(running), len(running)
        for r in running:
            if r.request.drafts is False or r.room < 2:
                continue
            bandits = self._bandits.get(r.sequence.index)
            if bandits is None:
                bandits = [DraftBandit(limit, _PRIORS.get(p.name, 0.7)) for p, limit in self._proposers]
                self._bandits[r.sequence.index] = bandits
            for n, ((proposer, _), bandit) in enumerate(zip(self._proposers, bandits, strict=True)):
                if not proposer.ready(r.sequence):
                    continue
                count = bandit.choose(r.room - 1, rows, sequences, self._times, self._seconds[proposer.name])
                if count:
                    drafts[r], self._chosen[r.sequence.index] = count, n
                    break
        return drafts

    def propose(self, room: dict[Running, int]) -> dict[Running, list[int]]:
        """Returns drafts for requests.

        Args:
            room: number of drafts that each request has room for in the cache.
        """
        tokens: dict[Running, list[int]] = {}
        for n, (proposer, _) in enumerate(self._proposers):
            requests = [r for r in room if self._chosen.get(r.sequence.index) == n]
            if not requests:
                continue
            sequences = [r.sequence for r in requests]
            proposer.catch_up(sequences)
            begun = self._clock()
            drafts: list[Draft] = proposer.propose(sequences, [room[r] for r in requests])
            count = sum(len(d.tokens) for d in drafts)
            if count:
                each, old = (self._clock() - begun) / count, self._seconds[proposer.name]
                self._seconds[proposer.name] = each if not old else _FADING * old + (1 - _FADING) * min(each, 2 * old)
            tokens.update({r: d.tokens for r, d in zip(requests, drafts, strict=True)})
        return tokens

    def record(self, outcomes: list[tuple[Running, int, int]]) -> None:
        """Adds the outcomes of a step: (request, drafts verified, drafts accepted) of all decoding requests."""
        sequences = len(outcomes)
        plain = self._times.decode(sequences)
        for r, drafted, accepted in outcomes:
            self.proposed, self.accepted = self.proposed + drafted, self.accepted + accepted
            self.drafts += drafted > 0
            bandits = self._bandits.get(r.sequence.index)
            if bandits is None or plain is None:
                continue
            chosen = self._chosen.get(r.sequence.index)
            with_drafts = self._times.decode(sequences + drafted) or plain
            for n, ((proposer, _), bandit) in enumerate(zip(self._proposers, bandits, strict=True)):
                if n == chosen and drafted:
                    cost = max(with_drafts - plain, 0.0) + drafted * self._seconds[proposer.name]
                    bandit.record(drafted, accepted, cost, plain / sequences)
                else:
                    bandit.record(0, 0, 0.0, plain / sequences)

    def follow(self, running: Running, states: object) -> None:
        """Passes the draft states of tokens that were added to the request's cache to the proposers."""
        for proposer, _ in self._proposers:
            if proposer.wants_states:
                proposer.follow(running.sequence, states)

    def forget(self, running: Running, *, ended: bool) -> None:
        """Discards the proposers' state of a request that has lost its cache or, with `ended`, has ended."""
        for proposer, _ in self._proposers:
            proposer.forget(running.sequence)
        if ended:
            self._bandits.pop(running.sequence.index, None)
