"""What a proposer of drafts is."""

from __future__ import annotations

from typing import Any, Protocol

from ..draft import Draft
from ..sequence import Sequence


class Proposer(Protocol):
    """Proposes what may follow sequences.

    Attributes:
        name: for reports, and for what is remembered of its cost.
        wants_states: `follow` is to be called with the model's hidden states.
    """

    name: str
    wants_states: bool

    def ready(self, sequence: Sequence) -> bool:
        """Whether there is something to propose: cheap, and never wrong where it says no."""

    def propose(self, sequences: list[Sequence], most: list[int]) -> list[Draft]:
        """At most so many drafts for each. The cache has room for them and the last token, which `cached` counts already."""

    def follow(self, sequence: Sequence, states: Any) -> None:
        """The model's last hidden states (normed), float32 torch [n, H], of the n tokens of this sequence that came into the
        cache since the last call, in order. The next token of each is among `sequence.tokens`, but for the very last one's,
        which may not be known yet."""

    def fork(self, sequence: Sequence, twin: Sequence) -> None:
        """`twin` begins as a copy of `sequence`, cache included."""

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended, or lost its cache: nothing of what is remembered of it holds any more."""
