"""Drafts out of the sequence itself: what followed the last n-gram when it was seen before (Saxena 2023, "Prompt Lookup
Decoding"). Costs next to nothing; pays where the answer repeats the prompt: summaries, edits, code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..draft import Draft
from ..sequence import Sequence


@dataclass
class _Index:
    """n-gram -> where what follows its latest occurrence begins; of the first `read` tokens."""

    places: dict[tuple[int, ...], int] = field(default_factory=dict)
    read: int = 0


class PromptLookupProposer:
    """The longest n-gram that was seen before counts, and of its occurrences the latest.

    Args:
        longest: tokens of an n-gram, at most.
        shortest: and at least.
    """

    name = "prompt_lookup"
    wants_states = False

    def __init__(self, longest: int = 3, shortest: int = 2) -> None:
        self._sizes = range(longest, min(shortest, longest) - 1, -1)
        self._indexes: dict[int, _Index] = {}

    def ready(self, sequence: Sequence) -> bool:
        return bool(self._behind(sequence, 1))

    def propose(self, sequences: list[Sequence], most: list[int]) -> list[Draft]:
        return [Draft(self._behind(sequence, count)) for sequence, count in zip(sequences, most, strict=True)]

    def _behind(self, sequence: Sequence, count: int) -> list[int]:
        tokens, index = sequence.tokens, self._indexes.setdefault(sequence.index, _Index())
        for end in range(index.read + 1, len(tokens)):  # n-grams that something follows
            for size in self._sizes:
                if size <= end:
                    index.places[tuple(tokens[end - size : end])] = end
        index.read = len(tokens) - 1
        for size in self._sizes:
            begin = index.places.get(tuple(tokens[-size:])) if size <= len(tokens) else None
            if begin is not None:
                return tokens[begin : begin + count]
        return []

    def follow(self, sequence: Sequence, states: Any) -> None:
        """Needs nothing."""

    def fork(self, sequence: Sequence, twin: Sequence) -> None:
        """Reads the twin's tokens when it is asked for drafts."""

    def forget(self, sequence: Sequence) -> None:
        self._indexes.pop(sequence.index, None)
