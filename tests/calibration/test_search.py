"""The search when predictions are wrong: the measurement of the assembled model decides."""

from __future__ import annotations

import itertools
import math

import pytest

from deepseek_optimizer import ConfigError
from deepseek_optimizer.calibration.budget import Choice, Option, path, total_bytes, total_kl
from deepseek_optimizer.calibration.search import Point, search, tighten
from deepseek_optimizer.errors import KlBudgetError

GROUPS = [
    [
        Option(("int4",), 45, weight * 0.1),
        Option(("q4_1",), 50, weight * 0.06),
        Option(("int8",), 85, weight * 4e-4),
        Option(("bf16",), 160, 0.0),
    ]
    for weight in [1.07**i for i in range(40)]
]


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.5, 6.0])
@pytest.mark.parametrize("budget", [50.0, 5.0, 0.5, 0.05])
def test_the_measured_kl_is_just_within_the_budget(factor: float, budget: float) -> None:
    calls = []

    def measured(choice):
        calls.append(choice)
        return factor * total_kl(choice) ** 1.1

    chosen, curve = search(GROUPS, budget, 0.0, measured)
    assert chosen in curve
    assert chosen.measured_kl == measured(chosen.choice) <= budget
    smaller = [c for c in path(GROUPS) if total_bytes(c) < chosen.bytes]
    assert all(factor * total_kl(c) ** 1.1 > 0.95 * budget for c in smaller), (
        "no smaller choice of the path is within the budget"
    )
    assert len(calls) <= 16 and len(set(calls[:-1])) == len(calls) - 1, "nothing is measured twice"


def test_the_curve_is_monotonic_and_lists_its_formats() -> None:
    _, curve = search(GROUPS, 1.0, 0.0, lambda choice: 2 * total_kl(choice))
    assert len(curve) >= 6
    for before, after in itertools.pairwise(curve):
        assert before.bytes < after.bytes
        assert before.measured_kl > after.measured_kl
        assert before.predicted_kl > after.predicted_kl
    assert curve[0].counts() == {"int4": 40}
    assert all(sum(point.counts().values()) == 40 for point in curve)


def test_the_kl_of_the_other_weights_counts() -> None:
    chosen, curve = search(GROUPS, 1.0, 0.9, lambda choice: 0.9 + total_kl(choice))
    assert 0.9 <= chosen.measured_kl <= 1.0
    assert all(math.isclose(point.predicted_kl, point.measured_kl) for point in curve)


def test_an_impossible_budget_names_the_smallest_possible() -> None:
    with pytest.raises(KlBudgetError, match="kl_budget=0.01: .* is 0.02") as caught:
        search(GROUPS, 0.01, 0.02, lambda choice: 0.02 + total_kl(choice))
    assert (caught.value.budget, caught.value.reached) == (0.01, 0.02)
    assert isinstance(caught.value, ConfigError)


def test_the_models_own_formats_are_tried_last() -> None:
    groups = [[Option(("bf16",), 160, 0.0), Option(("fp32",), 320, 0.0)] for _ in range(4)]  # bf16 alone: no KL measured
    chosen, _ = search(groups, 1e-15, 0.0, lambda choice: 1e-7 * any(o.formats == ("bf16",) for o in choice))
    assert all(option.formats == ("fp32",) for option in chosen.choice)


def test_tightening_from_a_first_prediction() -> None:
    """Rounded as a whole, choices are a third as bad as predicted, so that smaller ones are within the budget."""
    measured: list[Point] = []

    def at(choice: Choice) -> Point:
        measured.append(Point(choice, total_bytes(choice), total_kl(choice), total_kl(choice) / 3))
        return measured[-1]

    tighten(GROUPS, 1.0, 0.0, at, rounds=3, first=1.0)
    assert 0.9 < measured[0].predicted_kl <= 1.0
    assert 0.95 <= measured[-1].measured_kl <= 1.0 and measured[-1].bytes < measured[0].bytes
    assert len(measured) <= 3
    measured.clear()
    tighten(GROUPS, 1.0, 0.0, at, rounds=1, first=3.0)
    assert len(measured) == 1 and measured[0].predicted_kl > 2.9
