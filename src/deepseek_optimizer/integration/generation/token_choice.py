"""Whether the tokens of a `generate` request can be chosen by the backend, several steps at a time, and how.

They can if the request consists only of what `backends.decoding.RowChoice` describes. Then `generate` looks at tokens only
at the end of a call: a call ends at every token that could end a row. Random numbers are those that `torch.multinomial` would
draw, from the same generator: an exponential variate per logit and step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from transformers.generation import logits_process as processors

from ...backends.base import Int32
from ...backends.decoding import DecodeCall, Decoded, DraftedCall, RowChoice, TokenPenalties
from ...backends.sampling import GREEDY, TokenChoice
from .loop import RowStops
from .torch_generator import GENERATOR_LOCK, draws_as_expected, read_state, written_state

_STREAMED_SECONDS, _SECONDS = 0.01, 0.05  # maximum duration of a call with and without a streamer
_NOISE_BYTES = 4 << 20  # of a call
_ORDER = (
    processors.RepetitionPenaltyLogitsProcessor,
    processors.MinLengthLogitsProcessor,
    processors.MinNewTokensLengthLogitsProcessor,
    processors.TemperatureLogitsWarper,
    processors.TopKLogitsWarper,
    processors.TopPLogitsWarper,
    processors.MinPLogitsWarper,
)  # in which Transformers applies them


class Steps(Protocol):
    """Decode steps of some rows of a request.

    Attributes:
        rows: indices of the rows.
        vocab_size: number of logits.
    """

    rows: list[int]
    vocab_size: int

    def decode(self, tokens: list[int], call: DecodeCall) -> Decoded:
        """Runs a call; `tokens`: the last token of each row."""


class TokenChoices:
    """How the backend chooses the tokens of a request.

    Args:
        filters: temperature and filters; None: the largest logit is chosen.
        penalty: Transformers' repetition penalty; None: there is none.
        shortest: minimum length of a text, with its prompt; before, no token of `stop` is chosen.
        stop: when rows end; it has no criteria but the usual ones.
        rows: number of rows of the request.
        streamed: whether a streamer waits for the tokens.
    """

    def __init__(
        self, filters: TokenChoice | None, penalty: Any, shortest: int, stop: RowStops, rows: int, streamed: bool
    ) -> None:
        self._filters, self._penalty, self._shortest, self._rows = filters, penalty, shortest, rows
        self._seconds = _STREAMED_SECONDS if streamed else _SECONDS
        self._stops: Int32 = np.array(sorted(stop.eos), np.int64).clip(-1, 2**31 - 1).astype(np.int32)
        self._steps = 1.0  # a call's steps so far, as a moving maximum
        self._noise: torch.Tensor | None = None

    @classmethod
    def of(cls, config: Any, logits_processor: Any, stop: RowStops, rows: int, streamed: bool) -> TokenChoices | None:
        """Returns None if a request's tokens must be chosen one step at a time.

        Args:
            config: the generation config.
            logits_processor: the request's logits processors.
            stop, rows, streamed: see the class.
        """
        if stop.others:
            return None
        found: dict[Any, Any] = {}
        place = -1
        for processor in logits_processor or ():
            kind = type(processor)
            if kind not in _ORDER[place + 1 :] or not _usual(processor):
                return None
            place = _ORDER.index(kind)
            found[kind] = processor
        penalty = found.pop(processors.RepetitionPenaltyLogitsProcessor, None)
        shortest = 0
        for kind in (processors.MinLengthLogitsProcessor, processors.MinNewTokensLengthLogitsProcessor):
            if (least := found.pop(kind, None)) is not None:
                if {int(token) for token in least.eos_token_id} != set(stop.eos):
                    return None
                shortest = max(shortest, _shortest(least))
        if not config.do_sample:
            return None if found else cls(None, penalty, shortest, stop, rows, streamed)
        filters = TokenChoice(
            temperature=float(_field(found, processors.TemperatureLogitsWarper, "temperature", 1.0)),
            top_k=_field(found, processors.TopKLogitsWarper, "top_k", 0),
            top_p=_field(found, processors.TopPLogitsWarper, "top_p", 1.0),
            min_p=_field(found, processors.MinPLogitsWarper, "min_p", 0.0),
        )
        return cls(filters, penalty, shortest, stop, rows, streamed)

    def decode(self, steps: Steps, text: Callable[[int], torch.Tensor], tokens: list[int], count: int) -> Decoded:
        """Runs as many steps as can be run without looking at the tokens, at least one.

        Args:
            steps: the steps of the rows that have not ended.
            text: returns the text of a row so far, int64 [n].
            tokens: the last token of each row of `steps`.
            count: maximum number of steps.
        """
        if self._filters is None:
            rows = [self._row(RowChoice(), text, row, steps.vocab_size) for row in steps.rows]
            return steps.decode(tokens, DecodeCall(max(1, count), rows, self._stops, self._seconds))
        call = DecodeCall(max(1, count), (), self._stops, self._seconds)
        with GENERATOR_LOCK:
            return self._sampled(steps, text, tokens, call)

    @property
    def greedy(self) -> bool:
        """Whether the largest logit is chosen, of any token."""
        return self._filters is None and self._penalty is None and not self._shortest

    def drafted_call(self, rounds: int, drafts: int, room: int) -> DraftedCall:
        """A call with drafts, if `greedy`; for the arguments see `DraftedCall`."""
        return DraftedCall(rounds, drafts, room, RowChoice(), self._stops, self._seconds)

    def _sampled(self, steps: Steps, text: Callable[[int], torch.Tensor], tokens: list[int], call: DecodeCall) -> Decoded:
        vocab, choice = steps.vocab_size, RowChoice(self._filters or GREEDY)
        if draws_as_expected():
            before = torch.get_rng_state()
            call.generator, call.variates = read_state(before), self._rows * vocab
            call.rows = [self._row(choice._replace(variate=row * vocab), text, row, vocab) for row in steps.rows]
            decoded = steps.decode(tokens, call)
            if torch.equal(torch.get_rng_state(), before):  # otherwise, other code has drawn meanwhile
                torch.set_rng_state(written_state(before, call.generator))
            return decoded
        count = call.steps = max(1, min(call.steps, int(2 * self._steps), _NOISE_BYTES // (4 * self._rows * vocab)))
        noise, states = self._drawn(count, vocab)
        call.rows = [self._row(choice._replace(noise=noise[:, row]), text, row, vocab) for row in steps.rows]
        try:
            decoded = steps.decode(tokens, call)
        except BaseException:
            torch.set_rng_state(states[0])
            raise
        if (used := len(decoded.tokens)) < count:
            torch.set_rng_state(states[used])
        self._steps = max(used, 0.5 * self._steps, 1.0)
        return decoded

    def _drawn(self, steps: int, vocab: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The variates of `steps` steps, float32 [steps, rows, V], and the generator's states before each step."""
        shape = (steps, self._rows, vocab)
        if self._noise is None or len(self._noise) < steps:
            self._noise = torch.empty(shape, dtype=torch.float32, device="cpu")
        states = []
        for step in self._noise[:steps]:
            states.append(torch.get_rng_state())
            step.exponential_()
        return self._noise[:steps], states

    def _row(self, choice: RowChoice, text: Callable[[int], torch.Tensor], row: int, vocab: int) -> RowChoice:
        """A row's choice with its penalties, and without the tokens that would end it too early."""
        choice = choice._replace(penalties=self._penalties(text, row))
        steps = self._shortest - len(text(row)) if self._shortest else 0
        if steps <= 0:
            return choice
        return choice._replace(barred=self._stops[(self._stops >= 0) & (self._stops < vocab)], barred_steps=steps)

    def _penalties(self, text: Callable[[int], torch.Tensor], row: int) -> TokenPenalties | None:
        if self._penalty is None:
            return None
        ignored = getattr(self._penalty, "prompt_ignore_length", None)
        if isinstance(ignored, torch.Tensor):
            ignored = int(ignored[row])
        tokens = text(row)[ignored or 0 :].numpy().astype(np.int32)
        return TokenPenalties(tokens, 0, repetition=self._penalty.penalty)


def _field(found: dict[Any, Any], kind: Any, name: str, default: Any) -> Any:
    return getattr(found[kind], name) if kind in found else default


def _shortest(processor: Any) -> int:
    """The length below which a processor of Transformers lets no text end."""
    if isinstance(processor, processors.MinLengthLogitsProcessor):
        return int(processor.min_length)
    return int(processor.prompt_length_to_skip + processor.min_new_tokens)


def _usual(processor: Any) -> bool:
    """Whether a processor filters as with Transformers' defaults."""
    fields = vars(processor)
    return fields.get("filter_value", -float("inf")) == -float("inf") and fields.get("min_tokens_to_keep", 1) == 1
