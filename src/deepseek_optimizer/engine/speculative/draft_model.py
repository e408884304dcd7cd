"""Drafts by a smaller model of the same tokenizer (Leviathan et al. 2023; Chen et al. 2023): its likeliest tokens.

It has a cache of its own, which follows the sequence: what it drafted and the model did not take is cropped away, and what it
has not seen is run before it drafts again.
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
    """
    Args:
        runner: of the small model, over a memory of its own.
        context: positions it has: it drafts nothing past them.
        step_tokens: of a step at most.
    """

    name = "draft_model"
    wants_states = False

    def __init__(self, runner: Runner, context: int, step_tokens: int = 512) -> None:
        self._runner, self._context, self._step = runner, context, step_tokens
        self._own: dict[int, Sequence] = {}

    def ready(self, sequence: Sequence) -> bool:
        return len(sequence.tokens) < self._context

    def propose(self, sequences: list[Sequence], most: list[int]) -> list[Draft]:
        found: list[list[int]] = [[] for _ in sequences]
        active = []
        for n, sequence in enumerate(sequences):
            room = self._context - len(sequence.tokens)
            if min(most[n], room) > 0 and self._catch_up(sequence):
                active.append(n)
        for further in range(max(most, default=0)):
            active = [n for n in active if further < min(most[n], self._context - len(sequences[n].tokens))]
            if not active:
                break
            self._draft(sequences, active, found)
        return [Draft(tokens) for tokens in found]

    def _draft(self, sequences: list[Sequence], active: list[int], found: list[list[int]]) -> None:
        """A token more for each of `active`, in place; those whose cache is full leave it."""
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
        made = self._runner.step(parts, list(range(len(parts))), last_hidden=False)
        for n, own, token in zip(active, owns, np.argmax(made.logits.cpu().numpy(), -1).tolist(), strict=True):
            own.tokens.append(token)
            found[n].append(token)
        self._runner.forget(owns)

    def _catch_up(self, sequence: Sequence) -> bool:
        """Its cache holds all of the sequence's tokens but the last; False: there is no room."""
        own = self._own.get(sequence.index)
        if own is None:
            with self._runner.memory.locked() as manager:
                reach = None if sequence.reach is None else min(sequence.reach, self._context)
                own = self._own[sequence.index] = Sequence(sequence.index, [], SequenceBlocks(manager), reach=reach)
        same = _common(own.tokens, sequence.tokens, min(own.cached, len(sequence.tokens) - 1))
        self._runner.crop([own], [same])
        own.tokens = list(sequence.tokens)
        while (missing := len(own.tokens) - 1 - own.cached) > 0:
            start, count = own.cached, min(missing, self._step)
            try:
                self._runner.reserve([own], [count])
            except CacheFullError:
                return False
            phase = PREFILL if count > 1 else DECODE
            self._runner.step([Part(own, own.tokens[start : start + count], start, phase=phase)], [], last_hidden=False)
            self._runner.forget([own])
        return True

    def follow(self, sequence: Sequence, states: object) -> None:
        """Needs nothing."""

    def fork(self, sequence: Sequence, twin: Sequence) -> None:
        """Runs the twin's tokens when it is asked for drafts."""

    def forget(self, sequence: Sequence) -> None:
        own = self._own.pop(sequence.index, None)
        if own is not None:
            with self._runner.memory.locked():
                own.blocks.free()


def _common(a: list[int], b: list[int], most: int) -> int:
    """Tokens that both begin with, looked for from the end of the first `most`: what differs are the last few."""
    while most and a[:most] != b[:most]:
        most -= 1
    return most
