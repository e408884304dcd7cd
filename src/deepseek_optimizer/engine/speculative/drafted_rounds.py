"""Rounds with drafts of one sequence, several in one call of the backend, so that nothing in Python runs between them.

The drafts are those of an MTP layer, and the tokens those of single rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...errors import CacheFullError
from ..sequence import Part, Sequence
from .mtp import MtpProposer

if TYPE_CHECKING:
    from ...backends.decoding import DraftedCall, DraftedRounds
    from ..runner import Runner

# (maximum number of rounds, of drafts in a round and of tokens) -> the call; `token_of` is set here
MakeCall = Callable[[int, int, int], "DraftedCall"]


class DraftedRoundCalls:
    """Runs rounds with drafts.

    Args:
        runner: runs the model's plan.
        proposer: has one layer, and `calls` is True.
        make_call: how the model's tokens are chosen.
        choose: the model's token after some that were chosen already: (sequence's index, these tokens, logits [V]) -> token.
    """

    def __init__(
        self, runner: Runner, proposer: MtpProposer, make_call: MakeCall, choose: Callable[[int, list[int], Any], int]
    ) -> None:
        self._runner, self._proposer, self._make_call, self._choose = runner, proposer, make_call, choose

    def __call__(self, sequence: Sequence, rounds: int, drafts: int, room: int) -> DraftedRounds | None:
        """Runs up to `rounds` rounds, and appends their tokens to the sequence; all but the last are then in the cache.

        Args:
            sequence: the sequence.
            rounds: maximum number of rounds.
            drafts: maximum number of drafts in a round.
            room: maximum number of new tokens.

        Returns: the rounds, with all of their tokens; None if such a call is not possible now: nothing was changed.
        """
        if room < 2 or not self._proposer.ready(sequence) or not self._proposer.calls:
            return None
        room, before = min(room, rounds * (1 + drafts)), sequence.cached
        try:
            self._runner.reserve([sequence], [room])
        except CacheFullError:
            return None
        try:
            drafter, pending, states, vocabulary = self._proposer.begin_call(sequence, before)
            call = self._make_call(rounds, drafts, room)
            call.token_of = None if vocabulary is None else vocabulary.token_of
            result = self._runner.decode_drafted(Part(sequence, sequence.tokens[-1:], before), drafter, pending, states, call)
            tokens = [token for each in result.rounds for token in each.tokens]
            if result.logits is not None:
                last = self._choose(sequence.index, tokens, result.logits)
                tokens.append(last)
                result.rounds[-1].tokens.append(last)
        except BaseException:
            self._runner.crop([sequence], [before])
            raise
        self._runner.crop([sequence], [before + len(tokens)])
        sequence.tokens += tokens
        self._proposer.end_call(sequence, result.draft_states)
        self._runner.forget([sequence])
        return result
