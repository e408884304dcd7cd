"""The choice of formats against brute force."""

from __future__ import annotations

import itertools
import random

import pytest

from deepseek_optimizer.calibration.budget import Option, choose, path, total_bytes, total_kl


def random_groups(seed: int, count: int = 5) -> list[list[Option]]:
    """Groups of different sizes and sensitivities; sometimes a larger format is no better, or worse."""
    rng = random.Random(seed)
    groups = []
    for i in range(count):
        size, weight = rng.randint(1, 20), rng.expovariate(1.0)
        options = [
            Option((f"f{bits}",), int(size * bits * 2), weight * rng.uniform(0.5, 2) * 4.0**-bits)
            for bits in (4.5, 5, 8.5)[: rng.randint(1, 3)]
        ]
        groups.append([*options, Option((f"stored{i}",), size * 32, 0.0)])
        rng.shuffle(groups[-1])
    return groups


def brute_force(groups: list[list[Option]], budget: float) -> int:
    return min(total_bytes(c) for c in itertools.product(*groups) if total_kl(c) <= budget)


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_dominates_the_path(seed: int) -> None:
    groups = random_groups(seed)
    everything = list(itertools.product(*groups))
    along = path(groups)
    assert total_bytes(along[0]) == min(map(total_bytes, everything))
    assert total_kl(along[-1]) == 0
    for before, after in itertools.pairwise(along):
        assert total_bytes(after) > total_bytes(before) and total_kl(after) < total_kl(before)
        assert sum(a is not b for a, b in zip(before, after, strict=True)) == 1
    for choice in along:
        best = min(total_kl(c) for c in everything if total_bytes(c) <= total_bytes(choice))
        assert total_kl(choice) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_within_one_step_of_the_optimum(seed: int) -> None:
    groups = random_groups(seed)
    along = path(groups)
    step = max((total_bytes(b) - total_bytes(a) for a, b in itertools.pairwise(along)), default=0)
    exact = 0
    for share in (0.003, 0.03, 0.1, 0.3, 0.7):
        budget = share * total_kl(along[0])
        chosen, best = choose(groups, budget), brute_force(groups, budget)
        assert total_kl(chosen) <= budget
        assert best <= total_bytes(chosen) < best + max(step, 1)
        exact += total_bytes(chosen) == best
    assert exact >= 1


def test_the_rest_of_the_budget_is_used() -> None:
    """The path improves the large group first; once that has its best format, the small one may have a smaller one."""
    large = [Option(("int4",), 1000, 10.0), Option(("bf16",), 3000, 0.0)]
    small = [Option(("int4",), 10, 0.02), Option(("bf16",), 20, 0.0)]
    smaller = [Option(("int4",), 10, 0.001), Option(("bf16",), 100, 0.0)]
    chosen = choose([large, small, smaller], 0.0015)
    assert [o.formats[0] for o in chosen] == ["bf16", "bf16", "int4"]
    assert total_bytes(chosen) == brute_force([large, small, smaller], 0.0015)


def test_an_impossible_budget_gives_the_smallest_kl() -> None:
    groups = [[Option(("a",), 1, 2.0), Option(("b",), 2, 0.5), Option(("c",), 3, 0.75)]]
    assert choose(groups, 0.1) == (groups[0][1],)
