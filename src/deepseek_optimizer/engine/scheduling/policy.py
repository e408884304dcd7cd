"""What decides how steps are filled: the limits of a step, and the fixed policy, whose limits are always the engine's options.

Limits say only how much of what waits is processed at once. Which tokens come out does not depend on them, except for the
rounding of kernels that depends on the batch (see `EngineOptions.batch_invariant`). Does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..options import EngineOptions


@dataclass(frozen=True)
class StepLimits:
    """Limits of a step.

    Attributes:
        batch: largest number of sequences at once; fewer are chosen if they are as fast (`BatchSize`).
        step_tokens, stall: see `EngineOptions`.
        drafts: largest number of drafts of a request; None: as many as speculative decoding allows.
    """

    batch: int
    step_tokens: int
    stall: float | None
    drafts: int | None = None

    def __str__(self) -> str:
        stall = "none" if self.stall is None else f"{self.stall:g}"
        drafts = "all" if self.drafts is None else str(self.drafts)
        return f"batch={self.batch} step_tokens={self.step_tokens} stall={stall} drafts={drafts}"


@dataclass(frozen=True)
class Load:
    """The state of the engine before a step.

    Attributes:
        waiting, running: number of requests that wait for the batch, and of those in it.
        context: mean number of tokens of the running ones.
        acceptance: share of recent drafts that were accepted; 0 without drafts.
    """

    waiting: int
    running: int
    context: float
    acceptance: float


@dataclass(frozen=True)
class Progress:
    """What a step did for a request.

    Attributes:
        prompt, generated: tokens of its prompt that were processed, and generated ones.
        prompt_left, answer_left: tokens of its prompt that were missing before, and the most that could still be generated.
        answer: length of its answer in tokens, if it has ended; None: it has not.
    """

    prompt: int
    generated: int
    prompt_left: int
    answer_left: int
    answer: int | None = None


class Policy(Protocol):
    """Chooses the limits of steps.

    Attributes:
        learns: whether `limits` needs a load, and `stepped` is to be called.
    """

    learns: bool

    def limits(self, load: Load | None) -> StepLimits:
        """Returns the limits of the next step."""

    def stepped(self, seconds: float, progress: list[Progress]) -> None:
        """Adds a step with these limits.

        Args:
            seconds: its duration.
            progress: of each request in it.
        """


def limits_of(options: EngineOptions) -> StepLimits:
    """The limits that the options of an engine set."""
    return StepLimits(options.batch_size_range[1], options.step_tokens, options.stall)


class FixedPolicy:
    """The same limits for all steps."""

    learns = False

    def __init__(self, limits: StepLimits) -> None:
        self._limits = limits

    def limits(self, load: Load | None) -> StepLimits:
        return self._limits

    def stepped(self, seconds: float, progress: list[Progress]) -> None:
        """Learns nothing."""
