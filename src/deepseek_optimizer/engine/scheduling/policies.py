"""The policy that an engine's options name. Does not import torch."""

from __future__ import annotations

from ...errors import ConfigError
from ..options import EngineOptions
from .learned_policy import GOALS, LearnedPolicy
from .policy import FixedPolicy, Policy, limits_of
from .step_times import StepTimes


def policy_of(options: EngineOptions, times: StepTimes, drafts: int) -> Policy:
    """Creates the policy of an engine.

    Args:
        options: its options.
        times: its measured step times.
        drafts: largest number of drafts of a request; 0: there are none.

    Raises:
        ConfigError: there is no policy of that name.
    """
    if options.policy == "fixed":
        return FixedPolicy(limits_of(options))
    if options.policy not in GOALS:
        raise ConfigError(f"policy must be fixed, {' or '.join(GOALS)}, got {options.policy!r}")
    return LearnedPolicy(limits_of(options), times, options.policy, drafts)
