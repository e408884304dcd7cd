"""Sides of a comparison, each in a process of its own, in turns: what the machine does meanwhile hits all of them.

A side's figure in a round is the median of its runs there; a ratio is the median of the rounds' own ratios, with the lowest and
the highest beside it.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import BackendError
from .figures import KINDS, samples
from .runs import Run
from .statistics import percentile

Command = Sequence[str]
Values = dict[str, float]  # figure -> value of one round


def run_json(command: Command) -> dict[str, Any]:
    """What a process prints as its last line, in JSON.

    Raises:
        BackendError: it failed; holds the last line it wrote to stderr, and its cause the rest.
    """
    words = list(map(str, command))
    done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BackendError(f"{said} (exit code {done.returncode} of: {shlex.join(words)})") from RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def values_of(result: Mapping[str, Any]) -> Values:
    """A round's figures out of what a side printed (`sides/__init__.py` says what that is)."""
    found = samples([Run(**run) for run in result["runs"]])
    values = {name: percentile(v, 50) for name, v in found.items()}
    return values | {name: result[name] for name in KINDS if result.get(name) is not None}


def alternate(
    sides: Mapping[str, Command],
    rounds: int,
    note: Callable[[str], None] = lambda _: None,
    run: Callable[[str, Command], dict[str, Any]] = lambda _, command: run_json(command),
) -> dict[str, list[Values]]:
    """Side -> its figures, one entry a round.

    Args:
        note: takes what is going on.
        run: a side by its name and command, for who measures something beside it.
    """
    found: dict[str, list[Values]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name, command in sides.items():
            note(f"round {turn + 1} of {rounds}: {name}")
            found[name].append(values_of(run(name, command)))
    return found


def ratio_row(figure: str, baseline: Sequence[Values], side: Sequence[Values]) -> dict[str, Any]:
    """How many times better a side is: {"figure", "unit", "baseline" and "side" (medians), "better", "lowest", "highest"}."""
    kind = KINDS[figure]
    pairs = [(a[figure], b[figure]) for a, b in zip(baseline, side, strict=True)]
    ratios = [b / a if kind.more_is_better else a / b for a, b in pairs]
    return {
        "figure": figure,
        "unit": kind.unit,
        "baseline": statistics.median(a for a, _ in pairs),
        "side": statistics.median(b for _, b in pairs),
        "better": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def ratio_rows(found: Mapping[str, Sequence[Values]], baseline: str, figures: Sequence[str]) -> list[dict[str, Any]]:
    """A row for every side but the baseline and every figure that both have."""
    return [
        {"against": baseline, "name": name, **ratio_row(figure, found[baseline], rounds)}
        for name, rounds in found.items()
        if name != baseline
        for figure in figures
        if figure in rounds[0] and figure in found[baseline][0]
    ]
