"""The policy that an engine's options name. Does not import torch."""

from __future__ import annotations

from ...errors import ConfigError
from ..options import EngineOptions
from .batch_size import BatchSize
from .budget import PromptBudget
from .learned_policy import GOALS, LearnedPolicy
from .policy import FixedPolicy, Policy, limits_of
from .queue_model import QueueModel
from .step_times import StepTimes


def policy_of(options: EngineOptions, times: StepTimes, chunk: int | None = None) -> Policy:
    """Creates the policy of an engine.

    Args:
        options: its options.
        times: its measured step times.
        chunk: see `ModelFacts`.

    Raises:
        ConfigError: there is no policy of that name.
    """
    if options.policy == "fixed":
        return FixedPolicy(limits_of(options))
    if options.policy not in GOALS:
        raise ConfigError(f"policy must be fixed, {' or '.join(GOALS)}, got {options.policy!r}")
    low, high = options.batch_size_range

    def model() -> QueueModel:
        batch = BatchSize(low, high, times, options.target_itl)
        return QueueModel(batch, PromptBudget(options.step_tokens, options.stall, times, chunk), times)

    return LearnedPolicy(limits_of(options), times, model, options.policy)
