"""A round of speculative decoding over many sequences: draft, verify in one ragged step, keep what holds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...errors import CacheFullError
from ..draft import Draft
from ..sequence import Part, Sequence, rows_of
from .base import Proposer
from .gate import Gate

if TYPE_CHECKING:
    from ..runner import Runner
    from ..sampling.sampler import Sampler


class SpeculativeDecoder:
    """What drives a proposer.

    Args:
        runner: of the model's own plan.
        sampler: chooses tokens as the request wants them.
        clock: seconds; what the gate goes by.
    """

    def __init__(
        self, runner: Runner, proposer: Proposer, sampler: Sampler, gate: Gate, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.runner, self.proposer, self.sampler, self.gate, self._clock = runner, proposer, sampler, gate, clock

    def round(self, sequences: list[Sequence], room: list[int], used: list[Any] | None = None) -> list[list[int]]:
        """One step for every sequence: its new tokens, at least one, appended to it; all but the last are cached.

        Args:
            room: most tokens that each may get, 1 or more.
            used: of a single sequence, where to put (raw, processed) logits of each new token.

        Raises: CacheFullError. Errors leave tokens and cache as they were.
        """
        begun = self._clock()
        before = [s.cached for s in sequences]
        allowed = self.gate.choose(len(sequences), max(room) - 1)
        most = self._reserve(sequences, [min(allowed, r - 1) for r in room])
        try:
            drafts = self.proposer.propose(sequences, most) if any(most) else [Draft() for _ in sequences]
            parts = [Part(s, [s.tokens[-1], *d.tokens], n) for s, d, n in zip(sequences, drafts, before, strict=True)]
            made = self.runner.verify(parts, last_hidden=self.proposer.wants_states)
            logits = rows_of(made.logits, parts)
            found = [self.sampler.accept(s.index, d, rows, used) for s, d, rows in zip(sequences, drafts, logits, strict=True)]
        except BaseException:
            self.runner.crop(sequences, before)
            raise
        self.runner.crop(sequences, [n + len(tokens) for n, tokens in zip(before, found, strict=True)])
        for sequence, tokens in zip(sequences, found, strict=True):
            sequence.tokens += tokens
        if self.proposer.wants_states:
            for part, tokens, states in zip(parts, found, rows_of(made.last_hidden, parts), strict=True):
                self.proposer.follow(part.sequence, states[: len(tokens)])
        self.runner.forget(sequences)
        outcomes = [(len(d.tokens), len(tokens) - 1) for d, tokens in zip(drafts, found, strict=True)]
        self.gate.record(self._clock() - begun, outcomes)
        return found

    def _reserve(self, sequences: list[Sequence], most: list[int]) -> list[int]:
        """Room for one token and so many drafts each; without drafts where the cache has no room for them."""
        try:
            self.runner.reserve(sequences, [1 + n for n in most])
        except CacheFullError:
            most = [0] * len(sequences)
            self.runner.reserve(sequences, [1] * len(sequences))
        return most
