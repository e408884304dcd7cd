"""Compares two runs of the same tests: which pass on plain models but not on optimized ones, and which of those are allowed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from support.outcomes import Outcome

from .exceptions import MAX, Kind


@dataclass
class Comparison:
    """The comparison for one family.

    Attributes:
        control, optimized: number of passed tests.
        excused: (kind, test) explained by the list of exceptions.
        deviations: (test, error) not explained by it.
    """

    family: str
    control: int
    optimized: int
    excused: list[tuple[str, str]] = field(default_factory=list)
    deviations: list[tuple[str, str]] = field(default_factory=list)

    def line(self) -> str:
        kinds = Counter(kind for kind, _ in self.excused)
        listed = ", ".join(f"{kind} {count}" for kind, count in kinds.items()) or "none"
        return f"{self.family}: control {self.control}, optimized {self.optimized}; exceptions: {listed}"


def compare(family: str, control: Mapping[str, Outcome], optimized: Mapping[str, Outcome], kinds: Sequence[Kind]) -> Comparison:
    """Classifies each test that passes in `control`: it passes in `optimized` too, is excused, or deviates."""
    passed = [test for test, outcome in control.items() if outcome.outcome == "passed"]
    made = Comparison(family, len(passed), sum(o.outcome == "passed" for o in optimized.values()))
    for test in passed:
        result = optimized.get(test, Outcome("crashed", "it was not run"))
        if result.outcome == "passed":
            continue
        kind = next((kind for kind in kinds if kind.fits(family, test, result.error)), None)
        if kind is not None and result.outcome != "crashed":
            made.excused.append((kind.name, test))
        else:
            made.deviations.append((test, f"{result.outcome}: {result.error}"))
    return made


def faults(comparisons: Iterable[Comparison], kinds: Sequence[Kind], *, whole: bool = True) -> list[str]:
    """The problems, one line each; empty if there are none.

    Args:
        whole: every family and test was run, so that a kind that explains nothing is outdated.
    """
    result, used = [], set()
    if len(kinds) > MAX:
        result.append(f"{len(kinds)} kinds of exceptions are listed, {MAX} at most may be")
    for one in comparisons:
        used |= {kind for kind, _ in one.excused}
        if not one.control:
            result.append(f"{one.family}: no test passed on the plain model")
        for test, error in one.deviations:
            result.append(f"{one.family}: {test} passes on the plain model, not on the optimized one: {error}")
    if whole:
        stale = [kind.name for kind in kinds if kind.name not in used]
        result += [f"the exception {name!r} explains nothing any more: remove it" for name in stale]
    return result
