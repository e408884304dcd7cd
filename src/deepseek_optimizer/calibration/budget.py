"""The formats of the smallest model whose predicted KL divergence stays within a budget.

A group of matrices has options, each with its size and the KL divergence that it alone causes. KLs are taken as additive: to
second order in small errors they are, as far as the errors of different groups are independent. So this is a multiple-choice
knapsack: one option a group, fewest bytes, sum of KL <= budget.

On the lower convex hull of each group's (bytes, KL) points, every step to the next larger option buys less KL a byte than the
one before. All groups' steps, sorted by what they buy, are a path of choices, each the best of its size: the curve of size
against quality (Shoham and Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers"). Between two choices
of the path lies one step of one group; what room is left there is filled by single replacements.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """A group in certain formats. `formats`: those of its matrices, in order; `kl`: nats a token, >= 0."""

    formats: tuple[str, ...]
    bytes: int
    kl: float


Choice = tuple[Option, ...]  # one option a group, in the order of the groups


def total_bytes(choice: Choice) -> int:
    return sum(option.bytes for option in choice)


def total_kl(choice: Choice) -> float:
    return sum(option.kl for option in choice)


def path(groups: Sequence[Sequence[Option]]) -> list[Choice]:
    """Choices from the smallest to that of the smallest KL: each step enlarges one group, and KL falls with every step."""
    hulls = [_hull(options) for options in groups]
    steps = [(_gain(a, b), i, b) for i, hull in enumerate(hulls) for a, b in itertools.pairwise(hull)]
    current = [hull[0] for hull in hulls]
    choices = [tuple(current)]
    for _, group, option in sorted(steps, key=lambda step: -step[0]):  # stable: a group's own steps keep their order
        current[group] = option
        choices.append(tuple(current))
    return choices


def choose(groups: Sequence[Sequence[Option]], budget: float) -> Choice:
    """The smallest choice whose KL is within `budget`, up to less than one step of one group; where none is, that of the
    smallest KL."""
    along = path(groups)
    found = next((choice for choice in along if total_kl(choice) <= budget), None)
    return along[-1] if found is None else _filled(groups, found, budget)


def _hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of (bytes, KL), from the smallest on; larger ones that gain nothing are left out."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bytes, o.kl)):
        if hull and option.kl >= hull[-1].kl:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _gain(smaller: Option, larger: Option) -> float:
    """KL that a byte more buys. Two options of a hull never have the same size: the worse one was left out."""
    return (smaller.kl - larger.kl) / (larger.bytes - smaller.bytes)


def _filled(groups: Sequence[Sequence[Option]], choice: Choice, budget: float) -> Choice:
    """Single options replaced by smaller ones while that fits, the largest saving first."""
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
