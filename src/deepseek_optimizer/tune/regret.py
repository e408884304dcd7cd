"""The learned policy against the best fixed one in hindsight, by simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..engine.options import EngineOptions
from ..engine.scheduling.learned_policy import arms_around
from ..engine.scheduling.policy import FixedPolicy, StepLimits, limits_of
from .settings import value
from .simulation import Machine, simulate
from .traces import Trace


@dataclass(frozen=True)
class Regret:
    """Values of the goal on one trace, see `settings.value`: less is better.

    Attributes:
        fixed: by limits, the engine's own first.
        learned: of the learned policy.
    """

    fixed: dict[StepLimits, float]
    learned: float

    @property
    def best(self) -> StepLimits:
        """The best fixed limits in hindsight."""
        return min(self.fixed, key=lambda limits: self.fixed[limits])

    @property
    def over_best(self) -> float:
        """By how much the learned policy is worse than the best fixed one: 0.05: 5%; negative: better."""
        return self.learned / self.fixed[self.best] - 1

    @property
    def over_own(self) -> float:
        """By how much it is worse than the engine's own limits."""
        return self.learned / next(iter(self.fixed.values())) - 1


def regret(
    trace: Trace, options: EngineOptions, machine: Machine, goal: str, *, among: Sequence[StepLimits] | None = None
) -> Regret:
    """Replays a trace with each fixed policy that the learned one chooses from, and with the learned one.

    Args:
        trace: the requests.
        options: of the engine.
        machine: what steps cost.
        goal: "latency" or "throughput".
        among: fixed limits to replay, the engine's own first; None: all.
    """
    fixed = {
        limits: value(goal, simulate(trace, options, machine, FixedPolicy(limits)), None)
        for limits in among or arms_around(limits_of(options))
    }
    return Regret(fixed, value(goal, simulate(trace, replace(options, policy=goal), machine), None))
