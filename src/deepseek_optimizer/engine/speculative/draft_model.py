"""Drafts by a smaller model with the same tokenizer (Leviathan et al. 2023; Chen et al. 2023): its most likely tokens.

The draft model has its own cache, which follows the sequence: rejected drafts are cropped, and tokens that it has not
processed are processed before it drafts again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...backends.base import DECODE, PREFILL
from ...cache import SequenceBlocks
from ...errors import CacheFullError
from ..draft import Draft
from ..sequence import Part, Sequence

if TYPE_CHECKING:
    from ..runner import Runner


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
        self._runner, self._context, self._step = runner, context, step_tokens
        self._own: dict[int, Sequence] = {}

    def ready(self, sequence: Sequence) -> bool:
        return len(sequence.tokens) < self._context

    def propose(self, sequences: list[Sequence], max_drafts: list[int]) -> list[Draft]:
        drafts: list[list[int]] = [[] for _ in sequences]
        active = []
        for n, sequence in enumerate(sequences):
            room = self._context - len(sequence.tokens)
            if min(max_drafts[n], room) > 0 and self._catch_up(sequence):
                active.append(n)
        for further in range(max(max_drafts, default=0)):
            active = [n for n in active if further < min(max_drafts[n], self._context - len(sequences[n].tokens))]
            if not active:
                break
            self._draft(sequences, active, drafts)
        return [Draft(tokens) for tokens in drafts]

    def _draft(self, sequences: list[Sequence], active: list[int], drafts: list[list[int]]) -> None:
        """Appends one draft for each sequence in `active`; removes those from it whose cache is full."""
        for n in list(active):
            own = self._own[sequences[n].index]
            try:
                self._runner.reserve([own], [1])
            except CacheFullError:
                active.remove(n)
        if not active:
            return
        owns = [self._own[sequences[n].index] for n in active]
        parts = [Part(own, [own.tokens[-1]], own.cached - 1, phase=DECODE) for own in owns]
        result = self._runner.step(parts, list(range(len(parts))))
        for n, own, token in zip(active, owns, np.argmax(result.logits.cpu().numpy(), -1).tolist(), strict=True):
            own.tokens.append(token)
            drafts[n].append(token)
        self._runner.forget(owns)

    def _catch_up(self, sequence: Sequence) -> bool:
        """Brings the draft model's cache up to all tokens of the sequence but the last; returns False if there is no room."""
        own = self._own.get(sequence.index)
        if own is None:
            with self._runner.memory.locked() as manager:
                reach = None if sequence.reach is None else min(sequence.reach, self._context)
                own = self._own[sequence.index] = Sequence(sequence.index, [], SequenceBlocks(manager), reach=reach)
        same = _common(own.tokens, sequence.tokens, min(own.cached, len(sequence.tokens) - 1))
        self._runner.crop([own], [own.blocks.nearest(same)])
        own.tokens = list(sequence.tokens)
        while (missing := len(own.tokens) - 1 - own.cached) > 0:
            start, count = own.cached, min(missing, self._step)
            try:
                self._runner.reserve([own], [count])
            except CacheFullError:
                return False
            phase = PREFILL if count > 1 else DECODE
            self._runner.step([Part(own, own.tokens[start : start + count], start, phase=phase)], [])
            self._runner.forget([own])
        return True

    def follow(self, sequence: Sequence, states: object) -> None:
        """Does nothing: draft states are not used."""

    def catch_up(self, sequences: list[Sequence]) -> None:
        """Does nothing: draft states are not used."""

    def fork(self, sequence: Sequence, twin: Sequence) -> None:
        """Does nothing: the twin's tokens are processed when drafts are proposed for it."""

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
