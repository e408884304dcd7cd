"""Chooses the formats of the smallest model whose predicted KL divergence is within a budget.

A group of matrices has options, each with its size and the KL divergence that it alone causes. The KL divergences are assumed
to add up, which holds to second order in small errors if the errors of different groups are independent. The task is then a
multiple-choice knapsack problem: choose one option per group to minimize bytes, with the sum of KL <= budget.

On the lower convex hull of each group's (bytes, KL) points, every step to the next larger option reduces the KL by less per
byte than the one before. The steps of all groups, sorted by this reduction, form a path of choices, each the best of its size:
the trade-off curve of size and quality (Shoham and Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers").
Adjacent choices on the path differ by one step of one group; the rest of the budget is used by replacing single options.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """A choice of formats for one group.

    Attributes:
        formats: format of each of its matrices, in order.
        bytes: size of the group in these formats.
        kl: KL divergence that they alone cause, in nats per token, >= 0.
    """

    formats: tuple[str, ...]
    bytes: int
    kl: float


Choice = tuple[Option, ...]  # one option per group, in the order of the groups


def total_bytes(choice: Choice) -> int:
    return sum(option.bytes for option in choice)


def total_kl(choice: Choice) -> float:
    return sum(option.kl for option in choice)


def path(groups: Sequence[Sequence[Option]]) -> list[Choice]:
    """Returns choices from the smallest to the one with the smallest KL; each step enlarges one group and reduces the KL."""
    hulls = [_hull(options) for options in groups]
    steps = [(_gain(a, b), i, b) for i, hull in enumerate(hulls) for a, b in itertools.pairwise(hull)]
    current = [hull[0] for hull in hulls]
    choices = [tuple(current)]
    for _, group, option in sorted(steps, key=lambda step: -step[0]):  # stable: the steps of a group stay in order
        current[group] = option
        choices.append(tuple(current))
    return choices


def choose(groups: Sequence[Sequence[Option]], budget: float) -> Choice:
    """Returns the smallest choice with a total KL within `budget`, up to less than one step of one group.

    If there is none, returns the choice with the smallest KL.

    Args:
        groups: the options of each group.
        budget: maximum total KL divergence, in nats per token.
    """
    choices = path(groups)
    within = next((choice for choice in choices if total_kl(choice) <= budget), None)
    return choices[-1] if within is None else _filled(groups, within, budget)


def _hull(options: Sequence[Option]) -> list[Option]:
    """Returns the options on the lower convex hull of (bytes, KL), in ascending size and with descending KL."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bytes, o.kl)):
        if hull and option.kl >= hull[-1].kl:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _gain(smaller: Option, larger: Option) -> float:
    """Returns the reduction of KL per additional byte. Options on a hull have different sizes, so this is finite."""
    return (smaller.kl - larger.kl) / (larger.bytes - smaller.bytes)


def _filled(groups: Sequence[Sequence[Option]], choice: Choice, budget: float) -> Choice:
    """Replaces single options by smaller ones while the budget allows, the largest saving first."""
    current = list(choice)
    while True:
        room = budget - total_kl(tuple(current))
        fits = [
            (current[i].bytes - option.bytes, -option.kl, i, option)
            for i, options in enumerate(groups)
            for option in options
            if option.bytes < current[i].bytes and option.kl - current[i].kl <= room
        ]
        if not fits:
            return tuple(current)
        _, _, group, option = max(fits, key=lambda fit: fit[:3])
        current[group] = option
