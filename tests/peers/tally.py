"""Counts the outcomes of a suite by file, and finds what is not explained."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.outcomes import Outcome

from .deviations import Deviation, explanation, left_out
from .left_out import LEFT_OUT


@dataclass
class FileTally:
    """The tests of one file.

    Attributes:
        passed, skipped: numbers of tests; skipped are those that the suite itself skips.
        explained: numbers of tests by kind of deviation and reason.
        unexplained: name and error of each other test.
    """

    passed: int = 0
    skipped: int = 0
    explained: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(int)))
    unexplained: list[tuple[str, str]] = field(default_factory=list)

    def count(self, kind: str) -> int:
        return sum(self.explained.get(kind, {}).values())

    def explain(self, deviation: Deviation, tests: int = 1) -> None:
        self.explained[deviation.kind][deviation.why] += tests

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> FileTally:
        return cls(**stored)

    def stored(self) -> dict[str, Any]:
        explained = {kind: dict(reasons) for kind, reasons in self.explained.items()}
        return {"passed": self.passed, "skipped": self.skipped, "explained": explained, "unexplained": self.unexplained}


def tally(outcomes: Mapping[str, Outcome], deviations: Sequence[Deviation]) -> tuple[FileTally, set[Deviation]]:
    """The counts of one file that was run, and the deviations that explained something."""
    made, used = FileTally(), set()
    for test, outcome in outcomes.items():
        if outcome.outcome == "passed":
            made.passed += 1
            continue
        if outcome.outcome == "skipped":
            made.skipped += 1
            continue
        unrun = outcome.outcome == LEFT_OUT
        deviation = left_out(test, deviations) if unrun else explanation(test, outcome.error, deviations)
        if deviation is not None:
            made.explain(deviation)
            used.add(deviation)
        else:
            made.unexplained.append((test, f"{outcome.outcome}: {outcome.error}"))
    return made, used


def functions(file: Path) -> int:
    """Number of test functions in a file that is not run."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = [node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return sum(name.startswith("test") for name in names)


def share(files: Mapping[str, FileTally]) -> float:
    """The share of passed tests in those that apply: passed, different or unexplained."""
    passed = sum(one.passed for one in files.values())
    applicable = passed + sum(one.count("differs") + len(one.unexplained) for one in files.values())
    return passed / applicable if applicable else 0.0
