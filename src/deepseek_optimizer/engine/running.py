"""State of a request inside the engine: tokens, blocks, progress, sampling and detokenization. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from ..backends.qualities import prompt_quality
from ..cache.block_manager import BLOCK_TOKENS
from ..cache.prefix_cache import Key
from .adapters import Adapter
from .detokenizer import Detokenizer
from .pooling import Pooler
from .prompt_logprobs import PromptLogprobs
from .request import Output, Request
from .sampling.request_sampler import RequestSampler
from .sequence import Sequence


class RequestProgress(NamedTuple):
    """How far a request is.

    Attributes:
        number: identifies the request in the engine.
        prompt_tokens: number of tokens of its prompt.
        generated: number of tokens generated so far.
        max_tokens: maximum number of tokens to generate.
    """

    number: int
    prompt_tokens: int
    generated: int
    max_tokens: int


@dataclass(eq=False)
class Running:
    """State of a request in the engine.

    Attributes:
        number: order of arrival; among equal priorities, lower numbers are scheduled first.
        request: the request.
        sequence: tokens of prompt and text; tokens not in its cache yet are still to be processed.
        sampler: samples the tokens.
        text: detokenizes the text.
        max_tokens: maximum number of tokens to generate.
        arrived: time of arrival, in seconds of the engine's clock.
        prompt: number of prompt tokens in the sequence; decreases when a sliding window drops some.
        generated: number of tokens generated so far, including dropped ones.
        frequencies: with dynamic RoPE, the length in tokens that the frequencies are scaled for; 0: they are not scaled.
        keys: prefix cache keys of its full blocks, as far as they were needed; blocks moved by a sliding window have none.
        unmoved: number of leading blocks that a sliding window has not moved; None: all.
        registered: number of leading blocks that are in the prefix cache.
        confirmed: number of leading tokens from which finite logits were computed.
        unconfirmed: (group, index) of blocks that were released before they could be registered, and that the prefix cache
            may still hold.
        unconfirmed_states: numbers of blocks with recurrent states after them of which the same is true.
        restored: whether what the prefix cache lacked of its prompt was looked up in the cache's files.
        cached: number of tokens that were found in the prefix cache on admission.
        rounds, drafted: number of its decode steps, and of drafts in them.
        dropped: number of tokens that the sliding window has dropped.
        preempted: number of preemptions.
        starved: number of preemptions since its last token while no other request was running.
        pooler: has pooled the prompt's hidden states so far, for embeddings.
        prompt_logprobs: log probabilities of the prompt's tokens, as far as they are computed; None: not requested.
        pinned: ranges of tokens that a sliding window must keep, as positions in the current sequence.
        started, first, last: times of admission, of the first token and of the latest token, by the engine's clock.
        read, progress: with `Request.progress`, the number of prompt tokens reported last (-1: none), and the values of
            `Output.progress` for the next output.
        cancelled: whether the request is to be ended by the next step.
        adapter: the LoRA adapter that it uses.
        qualities: whether the model's weights have several qualities; that of the request is its sequence's.
    """

    number: int
    request: Request
    sequence: Sequence
    sampler: RequestSampler
    text: Detokenizer
    max_tokens: int
    arrived: float
    prompt: int
    generated: int = 0
    frequencies: int = 0
    keys: list[Key] = field(default_factory=list)
    unmoved: int | None = None
    registered: int = 0
    confirmed: int = 0
    unconfirmed: list[tuple[int, int]] = field(default_factory=list)
    unconfirmed_states: list[int] = field(default_factory=list)
    restored: bool = False
    cached: int = 0
    rounds: int = 0
    drafted: int = 0
    dropped: int = 0
    preempted: int = 0
    starved: int = 0
    pooler: Pooler | None = None
    prompt_logprobs: PromptLogprobs | None = field(default=None, init=False)
    pinned: tuple[tuple[int, int], ...] = ()
    started: float | None = None
    first: float | None = None
    last: float | None = None
    read: int = -1
    progress: list[int] = field(default_factory=list)
    cancelled: bool = False
    adapter: Adapter | None = None
    qualities: bool = False

    def __post_init__(self) -> None:
        if self.request.prompt_logprobs is not None:
            self.prompt_logprobs = PromptLogprobs(self.request.prompt, self.request.prompt_logprobs)

    @property
    def order(self) -> tuple[int, int]:
        """Sort key of scheduling order."""
        return self.request.priority, self.number

    @property
    def shareable(self) -> int | None:
        """Number of leading blocks that may be shared with other requests; None: all. Text of another quality than the prompt
        is not shared: it would be part of the prompt in others."""
        quality = self.sequence.quality
        if prompt_quality(quality) == quality:
            return self.unmoved
        of_prompt = self.prompt // BLOCK_TOKENS
        return of_prompt if self.unmoved is None else min(self.unmoved, of_prompt)

    @property
    def missing(self) -> int:
        """Number of tokens that are not in the cache yet."""
        return len(self.sequence.tokens) - self.sequence.cached

    @property
    def decoding(self) -> bool:
        """Whether it is in the decode phase: all tokens but the last are in the cache, and the last one was generated."""
        return self.generated > 0 and self.missing == 1

    @property
    def reusable(self) -> int:
        """Maximum number of tokens that may come from the prefix cache: at least one must be processed, and so must those whose
        logits give log probabilities that are not computed yet."""
        limit = len(self.sequence.tokens) - 1
        if self.prompt_logprobs is None or self.prompt_logprobs.complete:
            return limit
        return min(limit, max(0, self.prompt_logprobs.done - self.dropped))

    @property
    def room(self) -> int:
        """Number of tokens that may still be generated."""
        return self.max_tokens - self.generated

    def processed(self, start: int, count: int) -> None:
        """Records that a step has processed `count` tokens of the prompt from slot `start` on, for `Output.progress`."""
        begin, end = start + self.dropped, start + count + self.dropped
        self.progress += [tokens for tokens in (begin, end) if tokens > self.read]  # fewer: they were computed before
        self.read = max(self.read, end)

    def output(self) -> Output:
        """Returns an output with the current counts and no new tokens."""
        progress, self.progress = tuple(self.progress), []
        return Output(
            self.request.id,
            prompt_tokens=len(self.request.prompt),
            cached_tokens=self.cached,
            completion_tokens=self.generated,
            dropped_tokens=self.dropped,
            progress=progress,
            quality=self.sequence.quality if self.qualities and self.started is not None else None,
        )
