"""Counters and histograms of the engine, without a metrics library; `prometheus` exports them. Does not import torch."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Protocol

from ..backends.qualities import Quality
from .request import Finish, Request
from .running import Running

_TIMES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)


class Histogram:
    """Counts of values by upper bounds, as in Prometheus.

    Args:
        bounds: ascending upper bounds, inclusive; a last bucket counts larger values.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times


def _times() -> Histogram:
    return Histogram(_TIMES)


def _counts() -> Histogram:
    return Histogram(_COUNTS)


class EndedRequest(Protocol):
    """What the metrics need of a request that has ended; see `Running`."""

    request: Request
    arrived: float
    started: float | None
    first: float | None
    generated: int
    cached: int
    preempted: int


@dataclass
class EngineMetrics:
    """Metrics of an engine since its start; times are in seconds.

    Attributes:
        steps, step_seconds, step_sequences: number of steps, the time spent in them, and the sequences in all of them.
        prompt_tokens, generated_tokens, cached_tokens, looked_up_tokens: tokens processed in prompts, generated, found in the
            prefix cache, and looked up there.
        prompt_seconds: time from the first step of each request to its first token, in sum.
        longest: maximum number of tokens of a request, prompt and text together.
        preemptions: how often a request was preempted.
        copied_rows: number of rows of logits that were copied from a device to the host, where backends cannot choose or score.
        finished: number of ended requests by reason.
        qualities: number of ended requests by the quality that they were computed at, if the model has several.
        lowered: number of those that asked for a higher one.
        waits: time from arrival to the first step.
        first: time from arrival to the first token.
        between: time between the tokens of a request.
        whole: time from arrival to the end.
        inference, prefill, decode: time from the first step to the end, to the first token, and from there to the end.
        prompts, texts: number of tokens of prompts and of generated texts.
        limits: `max_tokens` of requests that give it.
        answers: number of answers that a client's request asks for.
        preempted: number of preemptions of a request.
        step_tokens: number of tokens in a step, of prompts and generated ones.
        recent_steps: (decoding rows, prompt tokens, seconds) of the latest steps.
    """

    steps: int = 0
    step_seconds: float = 0.0
    step_sequences: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prompt_seconds: float = 0.0
    longest: int = 0
    preemptions: int = 0
    copied_rows: int = 0
    cached_tokens: int = 0
    looked_up_tokens: int = 0
    finished: Counter[Finish] = field(default_factory=Counter)
    qualities: Counter[Quality] = field(default_factory=Counter)
    lowered: int = 0
    waits: Histogram = field(default_factory=_times)
    first: Histogram = field(default_factory=_times)
    between: Histogram = field(default_factory=_times)
    whole: Histogram = field(default_factory=_times)
    inference: Histogram = field(default_factory=_times)
    prefill: Histogram = field(default_factory=_times)
    decode: Histogram = field(default_factory=_times)
    prompts: Histogram = field(default_factory=_counts)
    texts: Histogram = field(default_factory=_counts)
    limits: Histogram = field(default_factory=_counts)
    answers: Histogram = field(default_factory=_counts)
    preempted: Histogram = field(default_factory=_counts)
    step_tokens: Histogram = field(default_factory=_counts)
    recent_steps: deque[tuple[int, int, float]] = field(default_factory=lambda: deque(maxlen=512))
    _stepped: int = 0  # generated tokens after the latest step

    def step(self, sequences: int, decoding: int, prompt: int, seconds: float, preemptions: int) -> None:
        self.steps += 1
        self.step_seconds += seconds
        self.step_sequences += sequences
        self.prompt_tokens += prompt
        self.preemptions = preemptions
        self.recent_steps.append((decoding, prompt, seconds))
        self.step_tokens.add(prompt + self.generated_tokens - self._stepped)
        self._stepped = self.generated_tokens

    def tokens(self, r: Running, count: int, now: float) -> None:
        """Counts `count` tokens that one step generated for a request; they share the time since its previous token."""
        self.generated_tokens += count
        if r.last is None:
            self.first.add(now - r.arrived)
            self.prompt_seconds += now - (r.arrived if r.started is None else r.started)
        else:
            self.between.add((now - r.last) / count, count)

    def computed_at(self, quality: Quality, asked: Quality) -> None:
        self.qualities[quality] += 1
        self.lowered += quality != asked

    def ended(self, r: EndedRequest, finish: Finish, now: float) -> None:
        self.finished[finish] += 1
        self.whole.add(now - r.arrived)
        self.prompts.add(len(r.request.prompt))
        self.texts.add(r.generated)
        self.longest = max(self.longest, len(r.request.prompt) + r.generated)
        self.cached_tokens += r.cached
        self.looked_up_tokens += len(r.request.prompt)
        self.preempted.add(r.preempted)
        if r.request.sampling.max_tokens is not None:
            self.limits.add(r.request.sampling.max_tokens)
        started = now if r.started is None else r.started
        self.waits.add(started - r.arrived)
        self.inference.add(now - started)
        if r.first is not None:
            self.prefill.add(r.first - started)
            self.decode.add(now - r.first)
