"""The interface of proposers, which draft tokens for speculative decoding."""

from __future__ import annotations

from typing import Any, Protocol

from ..draft import Draft
from ..sequence import Sequence


class Proposer(Protocol):
    """Proposes draft tokens to continue sequences.

    Attributes:
        name: identifies the proposer in reports and cost measurements.
        wants_states: whether `follow` must be called with the model's draft states.
    """

    name: str
    wants_states: bool

    def ready(self, sequence: Sequence) -> bool:
        """Whether there may be drafts for a sequence. Cheap; if it returns False, there are none."""

    def propose(self, sequences: list[Sequence], max_drafts: list[int]) -> list[Draft]:
        """Returns drafts for each sequence.

        Args:
            sequences: the sequences. Their caches have room for the last token and the drafts, which `cached` counts already.
            max_drafts: maximum number of drafts of each.
        """

    def follow(self, sequence: Sequence, states: Any) -> None:
        """Passes on the draft states of tokens that were added to the cache since the last call.

        Args:
            sequence: the sequence. Its `tokens` include the next token of each of these, except possibly of the last one.
            states: the model's draft states of these tokens (`StepOutput.draft_states`), float32 torch [n, D], in order: its
                last hidden states, normalized, or all residual streams of a model that has several.
        """

    def catch_up(self, sequences: list[Sequence]) -> None:
        """Called before drafts are proposed: processes the prompt, and the tokens of rounds without drafts, so that the time of
        proposing is that of any round with drafts."""

    def fork(self, sequence: Sequence, twin: Sequence) -> None:
        """Copies the state of `sequence` for `twin`, a copy of it including its cache."""

    def forget(self, sequence: Sequence) -> None:
        """Discards the state of a sequence that has ended or lost its cache."""
