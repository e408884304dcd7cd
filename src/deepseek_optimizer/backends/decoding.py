"""Several decode steps in one call: what `Plan.decode` and `Plan.decode_drafted` take and return. No torch at import.

The tokens are those that the caller would choose itself from the same logits. A backend chooses a token only where it is
certain of that; otherwise it returns the logits, and the caller chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from .sampling import GREEDY, TokenChoice

if TYPE_CHECKING:
    import torch

Int32 = npt.NDArray[np.int32]


class TokenPenalties(NamedTuple):
    """Penalties on tokens that have occurred, applied in fp32 before anything else.

    Attributes:
        tokens: int32 [n], the prompt and the text so far.
        prompt: how many of them are the prompt.
        repetition: divides a positive and multiplies a negative logit of a token that occurs among the last `window` tokens.
        window: 0: all.
        frequency, presence: `frequency * count + presence` is subtracted from the logit of a token that occurs `count` times in
            the text.
    """

    tokens: Int32
    prompt: int
    repetition: float = 1.0
    window: int = 0
    frequency: float = 0.0
    presence: float = 0.0


class RowChoice(NamedTuple):
    """How the tokens of one sequence are chosen in all steps of a call. At most one of `numbers`, `noise` and `variate` is
    given; without any, the largest logit is chosen, and `filters` is ignored.

    Attributes:
        filters: temperature, above 0, and filters; its `u` is ignored.
        numbers: float64 [steps] in [0, 1): step i chooses as `sampling.choose_token` does with u = numbers[i].
        noise: float32 torch [steps, V], above 0, rows dense: step i divides the logits by temperature, filters them as
            Transformers' warpers for top_k, top_p and min_p do, in this order, and chooses the largest probability divided by
            noise[i]. With exponential variates this is `torch.multinomial`.
        variate: as `noise`, with variates that torch's generator would draw (`DecodeCall.generator`): the number of the row's
            first one in a step.
        penalties: None: there are none.
        barred: int32 [n], tokens that the first `barred_steps` steps do not choose: after the penalties, their logits are -inf.
            None: there are none.
        barred_steps: how many steps of the call these are.
    """

    filters: TokenChoice = GREEDY
    numbers: npt.NDArray[np.float64] | None = None
    noise: torch.Tensor | None = None
    variate: int | None = None
    penalties: TokenPenalties | None = None
    barred: Int32 | None = None
    barred_steps: int = 0


@dataclass
class DecodeCall:
    """A call of `Plan.decode`.

    Attributes:
        steps: maximum number of steps, above 0.
        rows: one per sequence of the batch.
        stops: int32 [n]; a step that chooses one of these tokens is the last.
        seconds: no step but the first begins that would probably end later than this after the call.
        generator: uint32 [626], the state of torch's generator of exponential variates: `left`, `next` and the 624 words of
            at::mt19937. The call advances it by `variates` for each step whose tokens it chose. None: no row needs it.
        variates: number of variates that a step draws. Those of the rows follow each other, in the order of the rows.
        token_of: int32 [V], the token of each logit, for a plan with a draft vocabulary; None: its own number. Not with
            penalties.
        keep_logits: whether to return the logits of all steps. If the batch has a tensor for its logits, it has `steps` rows
            for each sequence then.
    """

    steps: int
    rows: Sequence[RowChoice]
    stops: Int32
    seconds: float
    generator: npt.NDArray[np.uint32] | None = None
    variates: int = 0
    token_of: Int32 | None = None
    keep_logits: bool = False


@dataclass
class DraftedCall:
    """A call of `Plan.decode_drafted`.

    Attributes:
        rounds: maximum number of rounds, above 0.
        drafts: maximum number of drafts in a round, above 0.
        room: maximum number of tokens, above 1.
        row: how the model's tokens are chosen, without noise and variates; `numbers` has `room` of them.
        stops: int32 [n]; a round that chooses one of these tokens ends with it, and is the last.
        seconds: no round but the first begins that would probably end later than this after the call.
        least: a draft whose probability is below this is the last of its round.
        token_of: int32 [N], the token of each of the drafting plan's logits; None: its own number.
    """

    rounds: int
    drafts: int
    room: int
    row: RowChoice
    stops: Int32
    seconds: float
    least: float = 0.0
    token_of: Int32 | None = None


class DraftedRound(NamedTuple):
    """A round of `Plan.decode_drafted`.

    Attributes:
        tokens: the chosen tokens: accepted drafts, and one that the model chose after them.
        drafted: number of drafts.
        seconds: duration.
    """

    tokens: list[int]
    drafted: int
    seconds: float


@dataclass
class DraftedRounds:
    """The result of `Plan.decode_drafted`.

    Attributes:
        rounds: the rounds, at least one.
        logits: float32 torch [V], of the last round's last token, which the caller must choose; its `tokens` are accepted
            drafts only. None: there is none.
        draft_states: the model's draft states of the last round, float32 torch [n, D], n being the number of its tokens,
            including one that the caller chooses.
    """

    rounds: list[DraftedRound]
    logits: torch.Tensor | None
    draft_states: torch.Tensor


@dataclass
class Decoded:
    """The result of `Plan.decode`.

    Attributes:
        tokens: the tokens that each step chose, int32 [steps, S].
        logits: float32 torch [S, V], of one further step that was run, whose tokens the caller must choose; None: there is
            none.
        draft_states: if the batch wants them, those of all steps, float32 torch [steps, S, D].
        kept_logits: if the call keeps them, those of all steps, float32 torch [steps, S, V].
    """

    tokens: Int32
    logits: torch.Tensor | None = None
    draft_states: torch.Tensor | None = None
    kept_logits: torch.Tensor | None = None

    @property
    def steps(self) -> int:
        """Number of steps that were run."""
        return len(self.tokens) + (self.logits is not None)
