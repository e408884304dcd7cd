"""Layers go to the machines that read them fastest, as far as their memory allows."""

from __future__ import annotations

import itertools
import random

import pytest

from deepseek_optimizer.graph.parallel.layer_shares import Machine, layer_ends


def equal(count: int) -> list[Machine]:
    return [Machine(100, 1e10)] * count


def parts(sizes, ends):
    return [sum(sizes[begin:end]) for begin, end in itertools.pairwise([0, *ends])]


def test_on_equal_machines_the_largest_share_is_small():
    assert layer_ends([1, 1, 1, 1], equal(2)) == [2, 4]
    assert layer_ends([9, 1, 1, 1], equal(2)) == [1, 4]
    assert layer_ends([1, 1, 1, 9], equal(2)) == [3, 4]
    assert layer_ends([5, 5, 5, 5, 5], equal(3)) in ([1, 3, 5], [2, 4, 5], [2, 3, 5])
    assert layer_ends([1, 1, 1], equal(3)) == [1, 2, 3]


def test_speeds_that_differ_a_little_are_the_same():
    machines = [Machine(100, 1.0e10), Machine(100, 0.95e10), Machine(100, 1.03e10)]
    assert layer_ends([2] * 9, machines) == [3, 6, 9]


def test_a_larger_memory_gets_more_layers():
    assert layer_ends([1] * 10, [Machine(80, 1e10), Machine(20, 1e10)]) == [8, 10]
    assert layer_ends([1] * 10, [Machine(2, 1e10), Machine(100, 1e10)]) == [1, 10]


def test_a_faster_machine_gets_what_fits():
    assert layer_ends([1] * 10, [Machine(7, 4e10), Machine(100, 1e10)]) == [7, 10]
    assert layer_ends([1] * 10, [Machine(100, 1e10), Machine(100, 4e10)]) == [1, 10]


def test_too_little_memory_is_exceeded_as_little_as_possible():
    assert parts([4] * 6, layer_ends([4] * 6, [Machine(8, 1e10), Machine(4, 1e10)])) == [16, 8]
    assert layer_ends([4] * 6, [Machine(-5, 1e10), Machine(100, 1e10)]) == [1, 6]  # less than the reserve


@pytest.mark.parametrize("seed", range(20))
def test_no_other_division_is_faster_or_fills_memory_less(seed):
    rng = random.Random(seed)
    sizes = [rng.randint(1, 20) for _ in range(rng.randint(3, 9))]
    machines = [Machine(rng.randint(15, 120), rng.choice([1.0, 1.25, 1.25**2, 1.25**5])) for _ in range(rng.randint(1, 3))]

    def cost(ends):
        shares = parts(sizes, ends)
        time = sum(share / machine.speed for share, machine in zip(shares, machines, strict=True))
        return time, max(share / machine.memory for share, machine in zip(shares, machines, strict=True))

    inner = itertools.combinations(range(1, len(sizes)), len(machines) - 1)
    every = [cost([*ends, len(sizes)]) for ends in inner]
    time, fill = cost(layer_ends(sizes, machines))
    fitting = [one for one in every if one[1] <= 1] or [one for one in every if one[1] <= min(fill for _, fill in every) + 1e-9]
    fastest = min(fitting)[0]
    assert time <= 1.02 * fastest + 1e-9
    assert fill <= min(other for spent, other in fitting if spent <= 1.02 * fastest) + 1e-6
