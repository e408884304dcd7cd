"""The best of many settings, by replays that drop the worse ones: all once, the best of them again, and the last few in pairs.

The best of many noisy measurements is an overestimate, so that the winner is measured once more in pairs with the defaults, and
only these count.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deepseek_optimizer.tune.replay import ReplayTooLong
from deepseek_optimizer.tune.search import Measure
from deepseek_optimizer.tune.settings import Figures, Settings, value

AGAIN, IN_PAIRS = 40, 10  # settings that are replayed again, and those that meet the defaults
PAIRS, LAST = 3, 7  # of replays of those settings, and of the winner


@dataclass(frozen=True)
class Race:
    """The result.

    Attributes:
        best: the winner.
        ratios: of the winner's pairs: what the defaults take at the goal, over what the winner takes. Above 1: it is better.
        replayed: number of settings whose first replay was not ended early.
    """

    best: Settings
    ratios: list[float]
    replayed: int

    @property
    def ratio(self) -> float:
        """The median of the pairs."""
        return statistics.median(self.ratios)


def race(
    quick: Measure,
    measure: Measure,
    candidates: Sequence[Settings],
    defaults: Settings,
    plain: Figures,
    goal: str,
    note: Callable[[str], None],
) -> Race:
    """Finds the best of some settings.

    Args:
        quick: replays with some settings; it raises ReplayTooLong for those that are clearly worse than the defaults.
        measure: replays with some settings.
        candidates: the settings, without the defaults.
        defaults, plain: the default settings, and what they show.
        goal: of `GOALS`.
        note: called with progress.

    Raises:
        ValueError: every replay was ended early.
    """
    taken: dict[Settings, list[float]] = {}
    for settings in candidates:
        try:
            taken[settings] = [value(goal, once(quick, settings), plain)]
        except ReplayTooLong:
            continue
    if not taken:
        raise ValueError("every replay was ended early: the machine is busy, or no settings are as good as the defaults")
    replayed = len(taken)
    note(f"{replayed} of {len(candidates)} settings were replayed to the end")
    for settings in _best(taken, AGAIN):
        taken[settings].append(value(goal, once(measure, settings), plain))
    again = {settings: values for settings, values in taken.items() if len(values) > 1}
    ratios = {settings: pairs(measure, settings, defaults, goal, PAIRS) for settings in _best(again, IN_PAIRS)}
    best = max(ratios, key=lambda settings: statistics.median(ratios[settings]))
    note(f"best: {best}, {statistics.median(ratios[best]):.3f} when it was chosen")
    return Race(best, pairs(measure, best, defaults, goal, LAST), replayed)


def pairs(measure: Measure, settings: Settings, defaults: Settings, goal: str, count: int) -> list[float]:
    """Replays of settings and of the defaults in turns, neither always first: the ratio of each pair, see `Race.ratios`."""
    found = []
    for number in range(count):
        order = (settings, defaults) if number % 2 else (defaults, settings)
        sides = {one: once(measure, one) for one in order}
        found.append(value(goal, sides[defaults], None) / value(goal, sides[settings], sides[defaults]))
    return found


def once(measure: Measure, settings: Settings) -> Figures:
    """One replay."""
    replays = measure(settings)
    try:
        return next(replays)
    finally:
        replays.close()  # type: ignore[attr-defined]


def _best(taken: dict[Settings, list[float]], count: int) -> list[Settings]:
    return sorted(taken, key=lambda settings: statistics.mean(taken[settings]))[:count]
