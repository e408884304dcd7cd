"""The number of replicas by the engines' loads."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from deepseek_optimizer.ray.autoscaling import ByLoad, wanted_replicas


def load(running: float, waiting: float = 0, usage: float = 0.5) -> dict[str, float]:
    return {"running": running, "waiting": waiting, "cache_usage": usage}


@pytest.mark.parametrize(
    ("loads", "wanted"),
    [
        ([load(0)], 0),
        ([load(24)], 1),
        ([load(25)], 2),
        ([load(24), load(0)], 1),
        ([load(30, 40), load(20)], 4),
        ([load(5, 1, 0.95)], 2),  # few sequences, which fill the cache
        ([load(5, 1, 0.95), load(5, 0, 0.95)], 1),  # the other one has room
        ([], 2),
    ],
)
def test_enough_replicas_for_the_target(loads, wanted: int) -> None:
    assert wanted_replicas(loads, 24, len(loads) or 2) == wanted


@pytest.mark.parametrize(("running", "wanted"), [(0, 1), (60, 3), (500, 4)])
def test_the_policy_stays_within_rays_bounds(running: int, wanted: int) -> None:
    gauges = {"running": {"r": running}, "waiting": {"r": 0.0, "new": 0.0}, "cache_usage": {"r": 0.1}}
    context = SimpleNamespace(
        aggregated_metrics=gauges, target_num_replicas=1, capacity_adjusted_min_replicas=1, capacity_adjusted_max_replicas=4
    )
    assert ByLoad(24.0)(context) == (wanted, {})


def test_no_more_replicas_are_added_while_one_starts() -> None:
    assert wanted_replicas([load(5, 1, 0.95)], 24, current=2) == 2


def test_without_gauges_nothing_changes() -> None:
    context = SimpleNamespace(
        aggregated_metrics=None, target_num_replicas=3, capacity_adjusted_min_replicas=1, capacity_adjusted_max_replicas=4
    )
    assert ByLoad(24.0)(context) == (3, {})
