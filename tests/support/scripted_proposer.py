"""Drafts from a known continuation, each correct with a given probability: for tests, and for `benchmarks/drafts.py`."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from deepseek_optimizer.engine.draft import Draft
from deepseek_optimizer.engine.sequence import Sequence


class ScriptedProposer:
    """Drafts that agree with a script, each with probability `agree` independent of the others; else the next token id.

    Args:
        scripts: index of a sequence -> all its tokens in plain decoding, including the prompt.
        agree: probability that a draft is the script's token.
        vocab_size: number of tokens.
    """

    name = "scripted"
    wants_states = False

    def __init__(self, scripts: Mapping[int, list[int]], agree: float, vocab_size: int, seed: int = 0) -> None:
        self._scripts, self._agree, self._vocab = scripts, agree, vocab_size
        self._random = random.Random(seed)

    def ready(self, sequence: Sequence) -> bool:
        return len(self._scripts[sequence.index]) > len(sequence.tokens)

    def propose(self, sequences: list[Sequence], max_drafts: list[int]) -> list[Draft]:
        result = []
        for sequence, count in zip(sequences, max_drafts, strict=True):
            begin = len(sequence.tokens)
            script = self._scripts[sequence.index][begin : begin + count]
            result.append(Draft([t if self._random.random() < self._agree else (t + 1) % self._vocab for t in script]))
        return result

    def follow(self, sequence: Sequence, states: Any) -> None:
        """Does not use hidden states."""

    def catch_up(self, sequences: list[Sequence]) -> None:
        """Does not use hidden states."""

    def fork(self, sequence: Sequence, twin: Sequence) -> None:
        """Keeps nothing of a sequence."""

    def forget(self, sequence: Sequence) -> None:
        """Keeps nothing of a sequence."""
