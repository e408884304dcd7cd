"""Prompt lookup: drafts the tokens that followed an earlier occurrence of the last n-gram (Saxena 2023, "Prompt Lookup
Decoding"). The cost is negligible; it helps when the answer repeats the prompt, as in summaries, edits and code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..draft import Draft
from ..sequence import Sequence


@dataclass
class _Index:
    """Index of n-grams.

    Attributes:
        places: n-gram -> position after its latest occurrence.
        read: number of tokens indexed.
    """

    places: dict[tuple[int, ...], int] = field(default_factory=dict)
    read: int = 0


class PromptLookupProposer:
    """Proposes the tokens after the latest earlier occurrence of the longest n-gram that occurred before.

    Args:
        max_ngram, min_ngram: maximum and minimum number of tokens of an n-gram.
    """

    name = "prompt_lookup"
    wants_states = False

    def __init__(self, max_ngram: int = 3, min_ngram: int = 2) -> None:
        self._sizes = range(max_ngram, min(min_ngram, max_ngram) - 1, -1)
        self._indexes: dict[int, _Index] = {}

    def ready(self, sequence: Sequence) -> bool:
        return bool(self._continuation(sequence, 1))

    def propose(self, sequences: list[Sequence], max_drafts: list[int]) -> list[Draft]:
        return [Draft(self._continuation(sequence, count)) for sequence, count in zip(sequences, max_drafts, strict=True)]

    def _continuation(self, sequence: Sequence, count: int) -> list[int]:
        """Indexes new tokens; returns up to `count` tokens that followed the last n-gram before."""
        tokens, index = sequence.tokens, self._indexes.setdefault(sequence.index, _Index())
        for end in range(index.read + 1, len(tokens)):  # n-grams with a following token
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
        """Does nothing: draft states are not used."""

    def catch_up(self, sequences: list[Sequence]) -> None:
        """Does nothing: draft states are not used."""

    def fork(self, sequence: Sequence, twin: Sequence) -> None:
        """Does nothing: the twin's tokens are indexed when drafts are proposed for it."""

    def forget(self, sequence: Sequence) -> None:
        self._indexes.pop(sequence.index, None)
