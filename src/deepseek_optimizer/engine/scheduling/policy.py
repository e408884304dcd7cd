"""What decides how steps are filled: the limits of a step, and the fixed policy, whose limits are always the engine's options.

Limits say only how much of what waits is processed at once. Which tokens come out does not depend on them, except for the
rounding of kernels that depends on the batch (see `EngineOptions.batch_invariant`). Does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ...cache.prefix_cache import Key
from ..options import EngineOptions


@dataclass(frozen=True)
class StepLimits:
    """Limits of a step.

    Attributes:
        batch: largest number of sequences at once; fewer are chosen if they are as fast (`BatchSize`).
        step_tokens, stall: see `EngineOptions`.
    """

    batch: int
    step_tokens: int
    stall: float | None

    def __str__(self) -> str:
        stall = "none" if self.stall is None else f"{self.stall:g}"
        return f"batch={self.batch} step_tokens={self.step_tokens} stall={stall}"


@dataclass(frozen=True)
class Served:
    """What a request that has ended took.

    Attributes:
        number: identifies the request.
        prompt: tokens of its prompt that were not in the prefix cache.
        rounds: decode steps of its answer after the step that completed the prompt.
        rows: mean number of rows in each of these: 1, and drafts.
        prefix: key of the last block of its prompt that was in the prefix cache; None: there was none.
        keys: of the other whole blocks of its prompt.
    """

    number: int
    prompt: int
    rounds: int
    rows: float = 1.0
    prefix: Key | None = None
    keys: Sequence[Key] = ()


class Policy(Protocol):
    """Chooses the limits of steps.

    Attributes:
        learns: whether the other methods than `limits` are to be called.
    """

    learns: bool

    def limits(self, now: float) -> StepLimits:
        """Returns the limits of the next step, which begins now."""

    def added(self, request: int, arrived: float, now: float) -> None:
        """Adds a request that came a while ago, while a step was running, or now."""

    def stepped(self, seconds: float, prompt: int, answers: int) -> None:
        """Adds a step with these limits, after the requests that it ended.

        Args:
            seconds: its duration.
            prompt: number of prompt tokens in it.
            answers: number of requests that it decoded tokens for, times the decode steps in it.
        """

    def ended(self, request: Served) -> None:
        """Adds that a request has ended."""


def limits_of(options: EngineOptions) -> StepLimits:
    """The limits that the options of an engine set."""
    return StepLimits(options.batch_size_range[1], options.step_tokens, options.stall)


class FixedPolicy:
    """The same limits for all steps."""

    learns = False

    def __init__(self, limits: StepLimits) -> None:
        self._limits = limits

    def limits(self, now: float) -> StepLimits:
        return self._limits

    def added(self, request: int, arrived: float, now: float) -> None:
        """Learns nothing."""

    def stepped(self, seconds: float, prompt: int, answers: int) -> None:
        """Learns nothing."""

    def ended(self, request: Served) -> None:
        """Learns nothing."""
