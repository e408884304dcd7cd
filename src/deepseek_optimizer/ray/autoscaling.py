"""The number of replicas by what their engines have to do."""

from __future__ import annotations

import math
from typing import Any

_CACHE_FULL = 0.9  # share of the cache above which a replica counts as fully used


def wanted_replicas(loads: list[dict[str, float]], target: float, current: int) -> int:
    """The number of replicas for a load.

    Args:
        loads: of each replica: sequences `running` and `waiting`, and the share `cache_usage` of its cache in use, from 0 to 1.
        target: running sequences of a replica, on average, that are wanted.
        current: number of replicas.

    Returns: enough for `target` on average; at least one more than those with a load if requests wait although all caches are
        full. Replicas that are starting have no load yet, so that no further ones are added until they have.
    """
    if not loads:
        return current
    wanted = math.ceil(sum(load["running"] + load["waiting"] for load in loads) / target)
    if all(load["waiting"] and load["cache_usage"] >= _CACHE_FULL for load in loads):
        wanted = max(wanted, len(loads) + 1)
    return wanted


class ByLoad:
    """A policy of Ray's autoscaling, which creates it.

    Args:
        target: see `wanted_replicas`.
    """

    def __init__(self, target: float) -> None:
        self._target = target

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The number of replicas that Ray should run, and the policy's state, which is empty.

        Args:
            context: Ray's `AutoscalingContext`.
        """
        gauges = context.aggregated_metrics or {}
        names = ("running", "waiting", "cache_usage")
        replicas = set.intersection(*(set(gauges.get(name, {})) for name in names))
        loads = [{name: gauges[name][replica] for name in names} for replica in replicas]
        wanted = wanted_replicas(loads, self._target, context.target_num_replicas)
        low, high = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return max(low, min(high, wanted)), {}
