"""A round of speculative decoding over many sequences: draft, verify in one ragged step, keep the accepted drafts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...errors import CacheFullError
from ..draft import Draft
from ..sequence import Part, Sequence, rows_of
from .base import Proposer
from .draft_length import DraftLengthController

if TYPE_CHECKING:
    from ...backends.decoding import Decoded, DraftedRound
    from ..runner import Runner
    from ..sampling.torch_sampler import TorchSampler
    from .drafted_rounds import DraftedRoundCalls


class SpeculativeDecoder:
    """Runs rounds of speculative decoding.

    Args:
        runner: runs the model's plan.
        proposer: proposes drafts.
        sampler: samples tokens by the request's parameters.
        draft_length: chooses the number of drafts.
        plain: runs several rounds without drafts at once, given the sequences, with room for one token each, and the maximum
            number of rounds; None: each round runs on its own.
        drafted: runs several rounds with drafts of one sequence at once; None: each round runs on its own.
        clock: returns the time in seconds, to measure rounds for `draft_length`.
    """

    def __init__(
        self,
        runner: Runner,
        proposer: Proposer,
        sampler: TorchSampler,
        draft_length: DraftLengthController,
        plain: Callable[[list[Sequence], int], Decoded] | None = None,
        drafted: DraftedRoundCalls | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.runner, self.proposer, self.sampler = runner, proposer, sampler
        self.draft_length, self._plain, self._drafted, self._clock = draft_length, plain, drafted, clock

    def round(self, sequences: list[Sequence], room: list[int], used: list[Any] | None = None) -> list[list[int]]:
        """Runs a round, or several at once, and appends the new tokens, at least one, to each sequence; all but the last are in
        the cache.

        Args:
            sequences: the sequences.
            room: maximum number of new tokens of each, at least 1.
            used: for a single sequence, a list to append the (raw, processed) logits of each new token to.

        Returns: the new tokens of each sequence.

        Raises:
            CacheFullError: too few blocks are free. After any error, tokens and cache are unchanged.
        """
        begun = self._clock()
        before = [s.cached for s in sequences]
        allowed = self.draft_length.choose(len(sequences), max(room) - 1)
        if allowed and self._drafted is not None and len(sequences) == 1 and used is None:
            self.proposer.catch_up(sequences)
            begun = self._clock()
            made = self._drafted(sequences[0], self.draft_length.drafted_rounds, allowed, room[0])
            if made is not None:
                self._record(made.rounds, self._clock() - begun)
                return [[token for each in made.rounds for token in each.tokens]]
        max_drafts = self._reserve(sequences, [min(allowed, r - 1) for r in room])
        if self._plain is not None and not allowed:
            chosen, rounds = self._plain_rounds(self._plain, sequences, before, min(self.draft_length.plain_rounds, *room))
            self.draft_length.record((self._clock() - begun) / rounds, [(0, 0)] * len(sequences), rounds)
            return chosen
        try:
            if any(max_drafts):
                self.proposer.catch_up(sequences)
                begun = self._clock()
            drafts = self.proposer.propose(sequences, max_drafts) if any(max_drafts) else [Draft() for _ in sequences]
            parts = [Part(s, [s.tokens[-1], *d.tokens], n) for s, d, n in zip(sequences, drafts, before, strict=True)]
            result = self.runner.verify(parts, draft_states=self.proposer.wants_states)
            logits = rows_of(result.logits, parts)
            accepted = [
                self.sampler.accept(s.index, d, rows, used) for s, d, rows in zip(sequences, drafts, logits, strict=True)
            ]
        except BaseException:
            self.runner.crop(sequences, before)
            raise
        self.runner.crop(sequences, [n + len(tokens) for n, tokens in zip(before, accepted, strict=True)])
        for sequence, tokens in zip(sequences, accepted, strict=True):
            sequence.tokens += tokens
        if self.proposer.wants_states:
            for part, tokens, states in zip(parts, accepted, rows_of(result.draft_states, parts), strict=True):
                self.proposer.follow(part.sequence, states[: len(tokens)])
        self.runner.forget(sequences)
        outcomes = [(len(d.tokens), len(tokens) - 1) for d, tokens in zip(drafts, accepted, strict=True)]
        self.draft_length.record(self._clock() - begun, outcomes)
        return accepted

    def _record(self, rounds: list[DraftedRound], seconds: float) -> None:
        """Records the rounds of a call that took so many seconds: what is not of a round is shared by all."""
        around = max(0.0, seconds - sum(each.seconds for each in rounds)) / len(rounds)
        for n, each in enumerate(rounds):
            self.draft_length.record(each.seconds + around, [(each.drafted, len(each.tokens) - 1)], follows=n > 0)

    def _plain_rounds(
        self, plain: Callable[[list[Sequence], int], Decoded], sequences: list[Sequence], before: list[int], most: int
    ) -> tuple[list[list[int]], int]:
        """Runs up to `most` rounds without drafts, as `round`; returns the new tokens of each sequence, and their number.

        `before`: number of tokens in the cache before them.
        """
        try:
            decoded = plain(sequences, most)
            chosen: list[list[int]] = decoded.tokens.T.tolist()
            if decoded.logits is not None:
                for sequence, tokens, logits in zip(sequences, chosen, decoded.logits, strict=True):
                    tokens.append(self.sampler.choose(sequence.index, tokens, logits))
        except BaseException:
            self.runner.crop(sequences, before)
            raise
        for sequence, tokens in zip(sequences, chosen, strict=True):
            sequence.tokens += tokens
        if decoded.draft_states is not None:
            for n, sequence in enumerate(sequences):
                self.proposer.follow(sequence, decoded.draft_states[:, n])
        self.runner.forget(sequences)
        return chosen, decoded.steps

    def _reserve(self, sequences: list[Sequence], max_drafts: list[int]) -> list[int]:
        """Reserves room for one token and the drafts of each; if the cache has no room for drafts, for one token only.

        Returns: the number of drafts of each that there is room for.
        """
        try:
            self.runner.reserve(sequences, [1 + n for n in max_drafts], undo=True)
        except CacheFullError:
            max_drafts = [0] * len(sequences)
            self.runner.reserve(sequences, [1] * len(sequences), undo=True)
        return max_drafts
