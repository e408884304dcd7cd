"""Requests to an engine, their sampling parameters, and its outputs. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from ..backends.qualities import EXACT, QUALITIES, Quality
from ..errors import RequestError, shown
from .pictures import PictureRows
from .pooling import Pooling
from .prompt_logprobs import PromptLogprobs

MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1_024
MAX_BAD_WORDS = 1_024
MAX_PRIORITY = 1000  # of a server's requests; those come last
Finish = Literal["stop", "length", "cancelled", "deadline", "error"]


class Grammar(Protocol):
    """State of one request's text in the grammar that it must conform to."""

    def mask(self, bits: npt.NDArray[np.int32]) -> bool:
        """Writes a bitmask of the tokens allowed next.

        Args:
            bits: int32 [ceil(V / 32)], overwritten; bit t % 32 of bits[t // 32] is set if token t is allowed.

        Returns: False if all tokens are allowed; `bits` is then not written.
        """

    def accept(self, token: int) -> None:
        """Advances by an allowed token. An end-of-text token is allowed where the text may end."""

    def rollback(self, tokens: int) -> None:
        """Removes the last `tokens` accepted tokens."""

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing may follow."""


class CompiledGrammar(Protocol):
    """A compiled grammar, which several requests can share."""

    def start(self) -> Grammar:
        """Returns a new state at the beginning of a text."""


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are sampled, and when generation ends.

    Each step is applied to the result of the previous one, in this order: repetition, presence and frequency penalty, DRY,
    logit_bias, bad_words, allowed_token_ids, grammar, top_n_sigma, temperature, top_k, top_p, min_p, typical_p, XTC. Mirostat
    replaces the steps after temperature, and top_n_sigma. Greedy decoding has no steps after the grammar. (llama.cpp applies
    the same filters in another order, with temperature last.)

    Attributes:
        max_tokens: maximum number of tokens to generate; 0: only process the prompt; None: until the context is full.
        min_tokens: until this many tokens are generated, no end-of-text or stop token is chosen, and no stop string ends the
            text.
        temperature: 0 to 100; 0 chooses the most likely token, and so does any value below 1e-5, for which scaled logits would
            overflow.
        top_k: sample from the k most likely tokens only; 0: from all.
        top_p: sample from the smallest set of most likely tokens whose probabilities sum to at least this; in (0, 1].
        min_p: minimum probability of a token, relative to that of the most likely one; in [0, 1].
        repetition_penalty: above 0, at most 100; 1: none. Applies to tokens of the prompt and of the text, as in Transformers.
        repetition_window: apply repetition_penalty only to tokens among this many last ones of prompt and text (llama.cpp's
            repeat_last_n); None: to all.
        presence_penalty, frequency_penalty: -2 to 2; apply to tokens of the text, as OpenAI defines them.
        logit_bias: token id -> value to add to its logit, -100 to 100; -100 forbids the token.
        typical_p: sample from the smallest set of tokens that sums to at least this probability and whose information content
            is nearest to the distribution's entropy; in (0, 1]; 1: all (Meister et al. 2022, "Locally Typical Sampling").
        top_n_sigma: sample from tokens whose logits are at most this many standard deviations below the largest; 0 to 100; 0:
            all (Tang et al. 2024, "Top-nsigma: Not All Logits Are You Need").
        xtc_probability, xtc_threshold: 0 to 1; with this probability, XTC excludes the tokens whose probabilities reach the
            threshold, except the least likely one of them. It has no effect with a threshold above 0.5. As in llama.cpp.
        dry_multiplier, dry_base, dry_allowed_length, dry_last_n: DRY subtracts dry_multiplier * dry_base ** (n -
            dry_allowed_length) from the logit of a token that would extend a repetition of n >= dry_allowed_length tokens,
            found in the last dry_last_n tokens of prompt and text (None: in all of them). The multiplier is 0 to 100 (0: off),
            the base 1 to 100. As in llama.cpp.
        dry_breakers: sequences of tokens that no repetition extends across: first token -> the tokens after it, of one or more
            sequences; see `sampling.words.BreakerIndex`.
        mirostat, mirostat_tau, mirostat_eta: 1 or 2: choose tokens by that version of Mirostat, which keeps the information
            content of the text near mirostat_tau bits per token (0 to 100), with the learning rate mirostat_eta (0 to 1); 0:
            off. As in llama.cpp (Basu et al. 2021, "Mirostat: A Neural Text Decoding Algorithm that Directly Controls
            Perplexity").
        bad_words: sequences of tokens that must not occur in the text, at most MAX_BAD_WORDS; see `sampling.words.bad_words`.
        allowed_token_ids: the only tokens that may be generated; None: all.
        seed: 0 to 2^64 - 1; the same request with the same seed gives the same text, with or without drafts. None: random.
        stop: strings that end the text; the text ends before the string.
        include_stop: the text ends after the stop string instead of before it.
        stop_token_ids: tokens that end the text, in addition to the model's end-of-text tokens.
        ignore_eos: the model's end-of-text tokens do not end the text.
        logprobs: number of most likely tokens to report for each generated token, 0 to MAX_LOGPROBS, besides the token itself.
            Log probabilities are those of the model's distribution before any of the above is applied. None: none are reported.
        sampled_logprobs: with `logprobs`: report those of the distribution that the token is drawn from, after all of the
            above; tokens that it excludes are not reported. Not with mirostat.
        grammar: grammar that the text must conform to.
        skip_special_tokens: omit special tokens from the text.
    """

    max_tokens: int | None = 512
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_window: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    typical_p: float = 1.0
    top_n_sigma: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_last_n: int | None = None
    dry_breakers: Mapping[int, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    bad_words: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    sampled_logprobs: bool = False
    grammar: CompiledGrammar | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        """Raises RequestError for a value outside its range."""
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 0, 1 << 31)
        _integer("min_tokens", self.min_tokens, 0, 1 << 31)
        _number("temperature", self.temperature, 0, 100)
        _integer("top_k", self.top_k, 0, 1 << 31)
        _number("top_p", self.top_p, 0, 1, above=True)
        _number("min_p", self.min_p, 0, 1)
        _number("repetition_penalty", self.repetition_penalty, 0, 100, above=True)
        _optional_integer("repetition_window", self.repetition_window, 0, 1 << 31)
        _number("typical_p", self.typical_p, 0, 1, above=True)
        _number("top_n_sigma", self.top_n_sigma, 0, 100)
        _number("xtc_probability", self.xtc_probability, 0, 1)
        _number("xtc_threshold", self.xtc_threshold, 0, 1)
        _number("dry_multiplier", self.dry_multiplier, 0, 100)
        _number("dry_base", self.dry_base, 1, 100)
        _integer("dry_allowed_length", self.dry_allowed_length, 0, 1 << 31)
        _optional_integer("dry_last_n", self.dry_last_n, 0, 1 << 31)
        _integer("mirostat", self.mirostat, 0, 2)
        _number("mirostat_tau", self.mirostat_tau, 0, 100)
        _number("mirostat_eta", self.mirostat_eta, 0, 1)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        _optional_integer("seed", self.seed, 0, (1 << 64) - 1)
        _optional_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.sampled_logprobs and self.mirostat:
            raise RequestError("sampled_logprobs", "is not possible with mirostat; leave one out")
        for token, bias in self.logit_bias.items():
            _integer("logit_bias's token", token, 0, 1 << 31)
            _number(f"logit_bias[{token}]", bias, -100, 100)
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, 1 << 31)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids", "is empty; give at least one token, or None for all")
        if len(self.bad_words) > MAX_BAD_WORDS or not all(self.bad_words):
            raise RequestError("bad_words", f"must be at most {MAX_BAD_WORDS} sequences of at least one token each")
        if len(self.stop) > MAX_STOPS or any(not s or len(s) > MAX_STOP_CHARACTERS for s in self.stop):
            raise RequestError("stop", f"must be at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters")

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5


def check_text(field: str, text: str) -> None:
    """Raises RequestError if the text has an unpaired surrogate, as invalid UTF-8 is decoded to; tokenizers reject it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(field, f"has an unpaired surrogate at character {error.start + 1:,}; use valid UTF-8") from None


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(name, f"must be an integer from {low} to {high}, got {shown(value)}")


def _optional_integer(name: str, value: Any, low: int, high: int) -> None:
    if value is not None:
        _integer(name, value, low, high)


def _number(name: str, value: Any, low: float, high: float, above: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or (above and value == low):
        raise RequestError(
            name, f"must be a number from {low:g} to {high:g}{f', above {low:g}' if above else ''}, got {shown(value)}"
        )


@dataclass(frozen=True)
class Request:
    """A request to an engine.

    Attributes:
        prompt: token ids.
        sampling: sampling parameters.
        id: identifier; the engine generates one if it is empty.
        priority: requests with lower values are scheduled first; those with MAX_PRIORITY or more are meant to wait.
        salt: only requests with the same salt share cached prefixes.
        deadline: time at which the request is ended if it is unfinished, in seconds of the engine's clock (`time.monotonic`).
        embed: return a vector pooled from the prompt's last hidden states instead of generating text.
        pooling: how the hidden states become a vector, with `embed`.
        scored_tokens: return the logits of these tokens after the prompt instead of generating text; empty: generate.
        classify: return the logits of the model's classes instead of generating text; for encoders with a classification head.
        token_types: for encoders, the type of each prompt token (BERT's pairs of sentences); empty: all 0.
        drafts: whether speculative decoding may be used; None: the engine's default.
        pinned: (begin, end) ranges of prompt tokens that a sliding window must keep; the first `sinks` tokens always stay.
        prompt_logprobs: number of most likely tokens to report for each prompt token but the first, 0 to MAX_LOGPROBS, besides
            the token itself; None: no log probabilities of the prompt. Its tokens are then processed even if the prefix cache
            has them.
        client: identifier of the client. Among requests of one priority, clients take turns, so that a request waits for
            earlier ones of the same client only.
        adapter: name of the LoRA adapter to use; "": the model without one.
        progress: report how many tokens of the prompt have been processed, see `Output.progress`.
        pictures: the prompt's rows of pictures, for multimodal models; None: it is text.
        quality: one of `backends.qualities.QUALITIES`, of models whose weights have several; None: that of the
            engine's options, or `min_quality` if that is higher.
        min_quality: the lowest quality that it may be computed at while other requests wait; None: `quality`.
    """

    prompt: list[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    id: str = ""
    priority: int = 0
    salt: str = ""
    deadline: float | None = None
    embed: bool = False
    pooling: Pooling = Pooling()
    scored_tokens: tuple[int, ...] = ()
    classify: bool = False
    token_types: tuple[int, ...] = ()
    drafts: bool | None = None
    pinned: tuple[tuple[int, int], ...] = ()
    client: str = ""
    adapter: str = ""
    prompt_logprobs: int | None = None
    progress: bool = False
    pictures: PictureRows | None = None
    quality: Quality | None = None
    min_quality: Quality | None = None

    def __post_init__(self) -> None:
        """Raises RequestError for a value outside its range."""
        _optional_integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        if self.pictures is not None and self.pictures.tokens != len(self.prompt):
            raise RequestError("pictures", f"are those of a prompt with {self.pictures.tokens} tokens, not {len(self.prompt)}")
        if self.embed and self.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs", "is not possible with embed; send two requests")
        for name, value in (("quality", self.quality), ("min_quality", self.min_quality)):
            if value is not None and value not in QUALITIES:
                raise RequestError(name, f"must be one of {', '.join(QUALITIES)}, got {shown(value)}")
        if QUALITIES.index(self.floor) > QUALITIES.index(self.quality or EXACT):
            raise RequestError("min_quality", f"{self.min_quality} is above the quality, {self.quality}; lower it")

    @property
    def patient(self) -> bool:
        """Whether it is meant to wait for others, as those of batches are."""
        return self.priority >= MAX_PRIORITY

    @property
    def floor(self) -> Quality:
        """The lowest quality that the request may be computed at."""
        return self.min_quality or self.quality or EXACT


def with_quality(request: Request, quality: Quality) -> Request:
    """A request with a quality: its own or, if it names none, this one, or its `min_quality` if that is higher."""
    if request.quality is not None or quality == EXACT:
        return request
    return replace(request, quality=max(quality, request.min_quality or quality, key=QUALITIES.index))


def check_quality(request: Request, qualities: bool) -> None:
    """Raises RequestError if a request chooses a quality of a model that has one only."""
    name = "quality" if request.quality is not None else "min_quality"
    if not qualities and (request.quality is not None or request.min_quality is not None):
        fix = 'load it with precision="int8_nested" (--precision int8_nested) and in one process, or leave the field out'
        raise RequestError(name, f"this model has one quality; {fix}")


def check_reading(request: Request, classifies: bool) -> None:
    """Checks the fields of a request that reads a prompt instead of generating text.

    Args:
        request: the request.
        classifies: whether the model has a classification head.

    Raises:
        RequestError: they contradict each other or the prompt, or the model has no such head.
    """
    if request.classify and not classifies:
        raise RequestError("model", "this model has no classification head; serve a ForSequenceClassification checkpoint")
    if request.embed + bool(request.scored_tokens) + request.classify > 1:
        raise RequestError("embed", "embed, scored_tokens and classify exclude each other")
    if request.embed and request.pooling.skip >= len(request.prompt):
        raise RequestError("prompt", "has no tokens besides those of the prompt that pooling skips; give it a text")
    if request.token_types and len(request.token_types) != len(request.prompt):
        raise RequestError("token_types", "must have one number for each token of the prompt")


@dataclass(frozen=True)
class TokenLogprob:
    """Log probability of a token.

    Attributes:
        token: token id.
        logprob: its natural log probability.
        top: (token, log probability) of the most likely tokens at the same position, best first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Output:
    """The results of one step for one request; the concatenated `text` of all outputs is the whole text.

    Attributes:
        request_id: id of the request.
        token_ids: new token ids, including the one that ended the text.
        text: new characters that are final: none that may belong to a stop string, and no incomplete character.
        logprobs: log probabilities of each new token, if requested.
        finish: why the request ended: "stop" (stop string, stop token or end of text), "length" (max_tokens or the end of the
            context), "cancelled", "deadline" or "error". None: the request continues.
        stop_reason: the stop string or token of the request that ended it.
        prompt_tokens, completion_tokens: number of tokens of the prompt and generated so far.
        cached_tokens: number of prompt tokens that were found in the prefix cache.
        dropped_tokens: number of tokens that the sliding window has dropped so far.
        embedding: pooled hidden states, float32 [H x number of pooling modes], with finish "stop", for requests with `embed`.
        scores: logits of the request's `scored_tokens`, or of the classes with `classify`: float32 [n], with finish "stop".
        error: message, with finish "error".
        transient: with finish "error": the same request may succeed later, when memory is free.
        prompt_logprobs: log probabilities of the prompt's tokens, if requested, in the first output after the prompt.
        quality: quality that the request is computed at, once it has started; None: the model's weights have one precision.
        progress: if requested, numbers of prompt tokens that are in the cache: those found in the prefix cache when the request
            starts, then after each step with a part of the prompt.
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
    scores: npt.NDArray[np.float32] | None = None
    error: str | None = None
    transient: bool = False
    prompt_logprobs: PromptLogprobs | None = None
    progress: tuple[int, ...] = ()
    quality: Quality | None = None


def check_tokens(request: Request, vocab_size: int) -> None:
    """Raises RequestError if the prompt is empty, or if the request needs tokens that the vocabulary does not have."""
    sampling = request.sampling
    if not request.prompt:
        raise RequestError("prompt", "is empty")
    if (request.prompt_logprobs or 0) > vocab_size:
        raise RequestError("prompt_logprobs", f"exceeds the vocabulary of {vocab_size}")
    for name, tokens in (
        ("prompt", request.prompt),
        ("logit_bias", sampling.logit_bias),
        ("stop_token_ids", sampling.stop_token_ids),
        ("allowed_token_ids", sampling.allowed_token_ids or ()),
        ("scored_tokens", request.scored_tokens),
        ("bad_words", tuple(chain.from_iterable(sampling.bad_words))),
    ):
        if tokens and (min(tokens) < 0 or max(tokens) >= vocab_size):
            wrong = next(token for token in tokens if not 0 <= token < vocab_size)
            raise RequestError(name, f"the token id {wrong} is out of vocabulary, which has {vocab_size} tokens")
