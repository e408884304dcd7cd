"""The smallest model whose MEASURED KL divergence is within a budget, and the curve of size against quality around it.

Predictions add up what each group costs alone; together the groups may cost more or less. So a choice is predicted, the
assembled model measured, and the prediction's budget moved by what the two differ, until the measured KL is just within the
budget.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import KlBudgetError
from .budget import Choice, Option, choose, path, total_bytes, total_kl

ROUNDS = 10  # predictions tried; two or three are usual, and a choice that comes again is not measured again
CLOSE = 0.95  # of the budget: a measured KL from there on is near enough
_SPREAD, _STEP = 6, 4.0  # other points of the curve: how many, and the factor between their predicted KLs


@dataclass(frozen=True)
class Point:
    """A choice of formats, measured. KLs in nats a token; `predicted_kl` is the sum of what the groups cost alone."""

    choice: Choice
    bytes: int
    predicted_kl: float
    measured_kl: float

    def counts(self) -> dict[str, int]:
        """How many matrices have each format."""
        return dict(Counter(format for option in self.choice for format in option.formats))


def search(
    groups: Sequence[Sequence[Option]],
    budget: float,
    base: float,
    measure: Callable[[Choice], float],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Point, list[Point]]:
    """The smallest measured choice within the budget, and the curve it lies on: the measured choices that no smaller one
    betters, from the smallest on.

    Args:
        groups: the options of each group.
        base: KL that is there whatever the formats: of the cache's storage.
        measure: the KL of the model assembled from a choice.
        progress: called after each measurement with how many are done, and how many there will be at most.

    Raises:
        KlBudgetError: even the best formats cost more than `budget`.
    """
    measured: dict[Choice, Point] = {}

    def at(choice: Choice) -> Point:
        if choice not in measured:
            measured[choice] = Point(choice, total_bytes(choice), base + total_kl(choice), measure(choice))
            if progress is not None:
                progress(len(measured), _SPREAD + ROUNDS + 1)
        return measured[choice]

    along = path(groups)
    for kl in (total_kl(along[0]) * _STEP**-i for i in range(_SPREAD)):
        at(next((choice for choice in along if total_kl(choice) <= kl), along[-1]))
    _tighten(groups, budget, base, at)
    if not any(point.measured_kl <= budget for point in measured.values()):
        at(along[-1])
    curve = _front(list(measured.values()))
    if curve[-1].measured_kl > budget:
        raise KlBudgetError(budget, curve[-1].measured_kl)
    return next(point for point in curve if point.measured_kl <= budget), curve


def _tighten(groups: Sequence[Sequence[Option]], budget: float, base: float, at: Callable[[Choice], Point]) -> None:
    """Moves the prediction's budget until the measured KL is close below the real one: by their ratio, or else by halves."""
    allowed, low, high = budget, 0.0, math.inf
    seen: set[Choice] = set()
    for _ in range(ROUNDS):
        choice = choose(groups, allowed - base)
        kl = at(choice).measured_kl
        if CLOSE * budget <= kl <= budget:
            return
        low, high = (allowed, high) if kl <= budget else (low, allowed)
        aim = allowed * budget * (1 + CLOSE) / 2 / max(kl, budget / 16)
        if choice in seen or not low < aim < high:
            aim = (low + high) / 2 if high < math.inf else 4 * allowed
        seen.add(choice)
        allowed = aim


def _front(points: list[Point]) -> list[Point]:
    """From the smallest on, those whose measured KL is below that of every smaller one."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bytes, p.measured_kl)):
        if not front or point.measured_kl < front[-1].measured_kl:
            front.append(point)
    return front
