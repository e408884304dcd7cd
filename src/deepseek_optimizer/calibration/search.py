"""Searches for the smallest model whose measured KL divergence is within a budget, and the trade-off curve around it.

A prediction adds up the KL divergences that the groups cause alone; together they may cause more or less. The search therefore
predicts a choice, measures the assembled model, and adjusts the budget of the prediction until the measured KL is just within
the real budget.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import KlBudgetError
from .budget import Choice, Option, choose, path, total_bytes, total_kl

ROUNDS = 10  # maximum number of predictions; two or three are usual, and repeated choices are not measured again
CLOSE = 0.95  # fraction of the budget from which on a measured KL is close enough
_SPREAD, _STEP = 6, 4.0  # number of other points of the curve, and the factor between their predicted KLs


@dataclass(frozen=True)
class Point:
    """A measured choice of formats.

    Attributes:
        choice: the option of each group.
        bytes: total size.
        predicted_kl: sum of the KL divergences that the groups cause alone, and that of the cache, in nats per token.
        measured_kl: KL divergence of the assembled model, in nats per token.
    """

    choice: Choice
    bytes: int
    predicted_kl: float
    measured_kl: float

    def counts(self) -> dict[str, int]:
        """Returns the number of matrices in each format."""
        return dict(Counter(format for option in self.choice for format in option.formats))


def search(
    groups: Sequence[Sequence[Option]],
    budget: float,
    base: float,
    measure: Callable[[Choice], float],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Point, list[Point]]:
    """Searches for the smallest choice whose measured KL is within the budget.

    Args:
        groups: the options of each group in ascending size; the last one is the model's own formats.
        budget: maximum KL divergence, in nats per token.
        base: KL divergence independent of the formats, caused by the cache's storage.
        measure: returns the KL divergence of the model assembled from a choice.
        progress: called after each measurement with the number of measurements and their maximum number.

    Returns: the smallest measured choice within the budget, and the trade-off curve: in ascending size, the measured choices
        with a smaller KL than all smaller ones.

    Raises:
        KlBudgetError: even the best formats exceed `budget`.
    """
    measured: dict[Choice, Point] = {}

    def at(choice: Choice) -> Point:
        if choice not in measured:
            measured[choice] = Point(choice, total_bytes(choice), base + total_kl(choice), measure(choice))
            if progress is not None:
                progress(len(measured), _SPREAD + ROUNDS + 1)
        return measured[choice]

    choices = path(groups)
    for kl in (total_kl(choices[0]) * _STEP**-i for i in range(_SPREAD)):
        at(next((choice for choice in choices if total_kl(choice) <= kl), choices[-1]))
    tighten(groups, budget, base, at)
    if not any(point.measured_kl <= budget for point in measured.values()):
        at(tuple(options[-1] for options in groups))  # the model's own formats: measured KL does not add up exactly
    curve = front(list(measured.values()))
    if curve[-1].measured_kl > budget:
        raise KlBudgetError(budget, curve[-1].measured_kl)
    return next(point for point in curve if point.measured_kl <= budget), curve


def tighten(
    groups: Sequence[Sequence[Option]],
    budget: float,
    base: float,
    at: Callable[[Choice], Point],
    rounds: int = ROUNDS,
    first: float | None = None,
) -> None:
    """Adjusts the budget of the prediction, by ratio or by bisection, until the measured KL is just within the real budget.

    Args:
        groups, budget, base: as in `search`.
        at: measures a choice.
        rounds: maximum number of choices that are measured.
        first: the budget of the first prediction; None: the real one.
    """
    allowed, low, high = budget if first is None else first, 0.0, math.inf
    seen: set[Choice] = set()
    for _ in range(rounds):
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


def front(points: list[Point]) -> list[Point]:
    """Returns, in ascending size, the points whose measured KL is below that of all smaller ones."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bytes, p.measured_kl)):
        if not front or point.measured_kl < front[-1].measured_kl:
            front.append(point)
    return front
