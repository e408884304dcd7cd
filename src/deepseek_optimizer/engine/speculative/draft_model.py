"""Drafts by a smaller model with the same tokenizer (Leviathan et al. 2023; Chen et al. 2023): its most likely tokens.

The draft model has its own cache, which follows the sequence: rejected drafts are cropped, and tokens that it has not
processed are processed before it drafts again.

It may be the model itself in a smaller format (self-speculation): the drafts of 4-bit weights are mostly the tokens of the
original ones, and take a fraction of their memory traffic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...backends.base import DECODE, PREFILL, Int32
from ...backends.decoding import DecodeCall, RowChoice
from ...cache import SequenceBlocks
from ...errors import CacheFullError
from ..draft import Draft
from ..sequence import Part, Sequence

if TYPE_CHECKING:
    from ..runner import Runner

_FEW = 16  # up to this many tokens are processed in the step that makes the first draft
_NO_STOPS = np.empty(0, np.int32)


@dataclass
class _Drafting:
    """A sequence that is drafted for.

    Attributes:
        own: the draft model's sequence, with the drafts so far.
        end: number of its tokens with all drafts.
        start: number of its tokens that were in the cache before the step.
        without_drafts: its blocks with the tokens before the drafts, to return to. None: the others can be cropped to them.
    """

    own: Sequence
    end: int
    start: int = 0
    without_drafts: SequenceBlocks | None = None


class DraftModelProposer:
    """Proposes the most likely tokens of a draft model.

    Args:
        runner: runs the draft model, over its own cache memory.
        context: context length of the draft model in tokens; it drafts nothing beyond it.
        step_tokens: maximum number of tokens in a step.
    """

    name = "draft_model"
    wants_states = False

    def __init__(self, runner: Runner, context: int, step_tokens: int = 512) -> None:
        self._runner, self._context, self._step_tokens = runner, context, step_tokens
        self._own: dict[int, Sequence] = {}

    def ready(self, sequence: Sequence) -> bool:
        return len(sequence.tokens) < self._context

    def propose(self, sequences: list[Sequence], max_drafts: list[int]) -> list[Draft]:
        try:
            drafting: dict[int, _Drafting] = {}
            for sequence, most in zip(sequences, max_drafts, strict=True):
                end = min(len(sequence.tokens) + most, self._context)
                if end > len(sequence.tokens) and (own := self._catch_up(sequence)) is not None:
                    drafting[sequence.index] = _Drafting(own, end)
            self._draft(list(drafting.values()))
        except BaseException:
            self._forget_all(sequences)
            raise
        return [Draft(drafting[s.index].own.tokens[len(s.tokens) :] if s.index in drafting else []) for s in sequences]

    def _draft(self, active: list[_Drafting]) -> None:
        several, wanted = False, active  # `several`: each sequence has one token to process
        try:
            while wanted := self._reserved([d for d in wanted if len(d.own.tokens) < d.end]):
                if several:
                    self._decode(wanted)
                else:
                    self._step(wanted)
                several = self._runner.decodes
                self._keep_states(wanted)
        finally:
            self._return_to_states(active)

    def _keep_states(self, active: list[_Drafting]) -> None:
        """Recurrent states, which cannot be cropped, are kept as they are before the first draft is processed."""
        for d in active:
            if d.own.blocks.states is not None and d.without_drafts is None:
                with self._runner.memory.locked():
                    d.without_drafts = d.own.blocks.fork()

    def _return_to_states(self, active: list[_Drafting]) -> None:
        for d in active:
            if d.without_drafts is not None:
                with self._runner.memory.locked():
                    d.own.blocks.free()
                d.own.blocks = d.without_drafts

    def _reserved(self, wanted: list[_Drafting]) -> list[_Drafting]:
        """Reserves room for the tokens that are not in the cache; returns those for which there is room."""
        reserved = []
        for d in wanted:
            d.start = d.own.cached
            try:
                self._runner.reserve([d.own], [len(d.own.tokens) - d.start])
            except CacheFullError:
                continue
            reserved.append(d)
        return reserved

    def _step(self, active: list[_Drafting]) -> None:
        """Processes the tokens of each sequence that were not in the cache, and adds one draft."""
        parts = [Part(d.own, d.own.tokens[d.start :], d.start, phase=DECODE) for d in active]
        rows = np.cumsum([len(part.ids) for part in parts]) - 1
        self._add(active, np.argmax(self._runner.step(parts, rows.tolist()).logits.cpu().numpy(), -1)[None])

    def _decode(self, active: list[_Drafting]) -> None:
        """As `_step`, with one token of each that is not in the cache, for several drafts in one call of the backend."""
        parts = [Part(d.own, d.own.tokens[-1:], d.start) for d in active]
        steps = min(min(d.end - len(d.own.tokens), 1 + d.own.blocks.room) for d in active)
        decoded = self._runner.decode(parts, DecodeCall(steps, [RowChoice()] * len(parts), _NO_STOPS, math.inf))
        self._add(active, decoded.tokens)
        if decoded.logits is not None:  # the backend leaves it to the caller
            self._add(active, np.argmax(decoded.logits.numpy(), -1)[None])

    def _add(self, active: list[_Drafting], tokens: Int32) -> None:
        """Adds tokens, [n, number of sequences]."""
        for d, drafts in zip(active, tokens.T.tolist(), strict=True):
            d.own.tokens += drafts

    def _catch_up(self, sequence: Sequence) -> Sequence | None:
        """Crops the draft model's sequence to what it has in common with a sequence, and processes all but its last few tokens.

        Returns: the draft model's sequence, with these tokens; None if there is no room.
        """
        own = self._own.get(sequence.index)
        if own is None:
            with self._runner.memory.locked() as manager:
                reach = None if sequence.reach is None else min(sequence.reach, self._context)
                own = self._own[sequence.index] = Sequence(sequence.index, [], SequenceBlocks(manager), reach=reach)
        same = _common(own.tokens, sequence.tokens, min(own.cached, len(sequence.tokens) - 1))
        self._runner.crop([own], [own.blocks.nearest(same)])
        self._runner.forget([own])  # here, since tokens before drafts that are rejected still attend to these blocks
        own.tokens = list(sequence.tokens)
        while (missing := len(own.tokens) - own.cached) > _FEW:
            start, count = own.cached, min(missing - 1, self._step_tokens)
            try:
                self._runner.reserve([own], [count])
            except CacheFullError:
                return None
            self._runner.step([Part(own, own.tokens[start : start + count], start, phase=PREFILL)], [])
            self._runner.forget([own])
        return own

    def follow(self, sequence: Sequence, states: object) -> None:
        """Does nothing: draft states are not used."""

    def catch_up(self, sequences: list[Sequence]) -> None:
        try:
            for sequence in sequences:
                if self.ready(sequence):
                    self._catch_up(sequence)
        except BaseException:
            self._forget_all(sequences)
            raise

    def fork(self, sequence: Sequence, twin: Sequence) -> None:
        """Does nothing: the twin's tokens are processed when drafts are proposed for it."""

    def _forget_all(self, sequences: list[Sequence]) -> None:
        """After an error: the caches may count tokens that were not processed."""
        for sequence in sequences:
            self.forget(sequence)

    def forget(self, sequence: Sequence) -> None:
        own = self._own.pop(sequence.index, None)
        if own is not None:
            with self._runner.memory.locked():
                own.blocks.free()


def _common(a: list[int], b: list[int], limit: int) -> int:
    """Returns the length of the common prefix, at most `limit`. Searched from its end, as only the last few tokens differ."""
    while limit and a[:limit] != b[:limit]:
        limit -= 1
    return limit
