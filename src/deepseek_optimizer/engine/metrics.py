"""What the engine counts and times, in one place. No torch, and no library: `prometheus` shows it to whoever asks."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from dataclasses import dataclass, field

from .request import Finish
from .running import Running

_TIMES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)


class Histogram:
    """Counts by upper bounds, as Prometheus has them."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times


def _times() -> Histogram:
    return Histogram(_TIMES)


def _counts() -> Histogram:
    return Histogram(_COUNTS)


@dataclass
class EngineMetrics:
    """Times in seconds; `waits` from arrival to the first step, `first` to the first token, `between` of a stream's tokens."""

    steps: int = 0
    step_seconds: float = 0.0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    cached_tokens: int = 0
    finished: Counter[Finish] = field(default_factory=Counter)
    waits: Histogram = field(default_factory=_times)
    first: Histogram = field(default_factory=_times)
    between: Histogram = field(default_factory=_times)
    whole: Histogram = field(default_factory=_times)
    prompts: Histogram = field(default_factory=_counts)
    texts: Histogram = field(default_factory=_counts)
    recent_steps: deque[tuple[int, int, float]] = field(default_factory=lambda: deque(maxlen=512))

    def step(self, sequences: int, decoding: int, prompt: int, seconds: float, preemptions: int) -> None:
        self.steps += 1
        self.step_seconds += seconds
        self.prompt_tokens += prompt
        self.preemptions = preemptions
        self.recent_steps.append((decoding, prompt, seconds))

    def tokens(self, r: Running, count: int, now: float) -> None:
        """A request got so many tokens at once: the first of them took the time, the others came with it."""
        self.generated_tokens += count
        if r.last is None:
            self.first.add(now - r.arrived)
        else:
            self.between.add((now - r.last) / count, count)

    def ended(self, r: Running, finish: Finish, now: float) -> None:
        self.finished[finish] += 1
        self.whole.add(now - r.arrived)
        self.prompts.add(len(r.request.prompt))
        self.texts.add(r.generated)
        self.cached_tokens += r.cached
        self.waits.add((r.started or now) - r.arrived)
