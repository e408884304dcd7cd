"""What is asked of an engine, and what it answers: requests, how their tokens are chosen, and outputs. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import RequestError, shown

MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1_024
Finish = Literal["stop", "length", "cancelled", "deadline", "error"]


class Grammar(Protocol):
    """Where one request is in a grammar that its text must keep to."""

    def mask(self, bits: npt.NDArray[np.int32]) -> bool:
        """Writes which tokens may come next: bit t % 32 of bits[t // 32] for token t, int32 [ceil(V / 32)].

        Returns: False where all may, and `bits` was not written.
        """

    def accept(self, token: int) -> None:
        """Goes on by a token that may come. An end-of-text token where the text may end is one."""

    def rollback(self, tokens: int) -> None:
        """Takes back the last so many tokens."""

    @property
    def finished(self) -> bool:
        """Whether the text is whole and nothing may follow."""


class CompiledGrammar(Protocol):
    """A grammar that requests can share."""

    def start(self) -> Grammar: ...


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen, and when it ends.

    Every filter works on what those before it left, in this order: repetition, presence and frequency penalty, logit_bias,
    grammar, temperature, top_k, top_p, min_p.

    Attributes:
        max_tokens: to generate at most, 1 or more; None: as many as the context has room for.
        min_tokens: before these no end-of-text or stop token is chosen, and no stop string ends the text.
        temperature: 0 takes the likeliest token, and so does any below 1e-5, where logits over it would overflow.
        top_k: 0: all. top_p in (0, 1]. min_p in [0, 1]: of the likeliest token's probability.
        repetition_penalty: above 0; 1: none. On tokens of the prompt and of the text, as in Transformers.
        presence_penalty, frequency_penalty: -2 to 2, on tokens of the text, as OpenAI defines them.
        logit_bias: token -> what is added to its logit, -100 to 100; -100 forbids it.
        seed: 0 to 2^64 - 1: the same request gives the same text again, drafts or not. None: unpredictable.
        stop: strings that end the text, which then stops before them (behind them with include_stop).
        stop_token_ids: tokens that end the text, beside the model's own.
        ignore_eos: the model's own end-of-text tokens do not end the text.
        logprobs: how many of the likeliest tokens to report at each place, 0 to MAX_LOGPROBS, beside the chosen one: log
            probabilities of the model's own distribution, before any of the above. None: none.
        grammar: what the text must keep to.
        skip_special_tokens: leave them out of the text.
    """

    max_tokens: int | None = 512
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    grammar: CompiledGrammar | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        """Raises RequestError for a value outside its range."""
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 1 << 31)
        _integer("min_tokens", self.min_tokens, 0, 1 << 31)
        _number("temperature", self.temperature, 0, 100)
        _integer("top_k", self.top_k, 0, 1 << 31)
        _number("top_p", self.top_p, 0, 1, above=True)
        _number("min_p", self.min_p, 0, 1)
        _number("repetition_penalty", self.repetition_penalty, 0, 100, above=True)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.seed is not None:
            _integer("seed", self.seed, 0, (1 << 64) - 1)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        for token, bias in self.logit_bias.items():
            _integer("logit_bias's token", token, 0, 1 << 31)
            _number(f"logit_bias[{token}]", bias, -100, 100)
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, 1 << 31)
        if len(self.stop) > MAX_STOPS or any(not s or len(s) > MAX_STOP_CHARACTERS for s in self.stop):
            raise RequestError("stop", f"at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters")

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5


def check_text(field: str, text: str) -> None:
    """Raises RequestError for half of a surrogate pair, which no tokenizer takes; bytes that aren't UTF-8 become one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            field, f"has half of a surrogate pair at character {error.start + 1:,}, which is no character; give UTF-8"
        ) from None


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(name, f"must be an integer from {low} to {high}, got {shown(value)}")


def _number(name: str, value: Any, low: float, high: float, above: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or (above and value == low):
        raise RequestError(
            name, f"must be a number from {low:g} to {high:g}{', and not the first' if above else ''}, got {shown(value)}"
        )


@dataclass(frozen=True)
class Request:
    """
    Attributes:
        prompt: token ids.
        id: the engine makes it where it is empty.
        priority: lower goes first.
        salt: only requests with the same one share cached prefixes: whose key it is.
        deadline: of the engine's clock (`time.monotonic`), by which the request must have ended.
        embed: the answer is the mean of the last hidden states of the prompt, and no text.
        drafts: whether tokens may be drafted for it; None: as the engine does by default.
        pinned: (begin, end) of prompt tokens that a window must keep; the first `sinks` always stay.
        client: whose it is: of requests of one priority, clients have their turns, and only a client's own wait for each other.
    """

    prompt: list[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    id: str = ""
    priority: int = 0
    salt: str = ""
    deadline: float | None = None
    embed: bool = False
    drafts: bool | None = None
    pinned: tuple[tuple[int, int], ...] = ()
    client: str = ""


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log probability, and the likeliest at its place: (token, log probability), best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Output:
    """What a step brought one request; the pieces of `text` add up to the whole text.

    Attributes:
        request_id: whose.
        token_ids: new tokens, with the one that ended the text if one did.
        text: new characters that are sure to stay: none that a stop string may yet take away, and no half of a character.
        logprobs: of each new token, where they were asked for.
        finish: why it ended: at a stop string, stop token or end of text "stop", at max_tokens or the end of the context
            "length". None: it goes on.
        stop_reason: the string or token of the request's own that ended it.
        prompt_tokens, cached_tokens, completion_tokens: so far; `cached_tokens` of the prompt came from the prefix cache.
        dropped_tokens: that the window has let go so far.
        embedding: float32 [H], with finish "stop", of requests with `embed`.
        error: with finish "error": what went wrong.
        transient: with finish "error": the same request may well be served later, when there is memory.
    """

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] | None = None
    finish: Finish | None = None
    stop_reason: str | int | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    dropped_tokens: int = 0
    embedding: npt.NDArray[np.float32] | None = None
    error: str | None = None
    transient: bool = False
