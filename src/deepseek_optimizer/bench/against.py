"""Runs the sides of a comparison alternately, each in a process of its own, so that disturbances affect all of them.

A side's figure in a round is the median of its runs. A ratio is the median of the ratios of the rounds, reported with the
lowest and the highest.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import BackendError
from .metrics import METRICS, samples
from .runs import Run
from .statistics import percentile

Command = Sequence[str]
Values = dict[str, float]  # figure -> its value in one round


def run_json(command: Command) -> dict[str, Any]:
    """The JSON object that a process prints on its last line.

    Raises:
        BackendError: it failed; contains the last line of its stderr, and its cause all of it.
    """
    words = list(map(str, command))
    done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        message = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BackendError(f"{message} (exit code {done.returncode} of: {shlex.join(words)})") from RuntimeError(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def values_of(result: Mapping[str, Any]) -> Values:
    """The figures of a round from the output of a side, described in `sides/__init__.py`."""
    lists = samples([Run(**run) for run in result["runs"]])
    values = {name: percentile(v, 50) for name, v in lists.items()}
    return values | {name: result[name] for name in METRICS if result.get(name) is not None}


def alternate(
    sides: Mapping[str, Command],
    rounds: int,
    note: Callable[[str], None] = lambda _: None,
    run: Callable[[str, Command], dict[str, Any]] = lambda _, command: run_json(command),
) -> dict[str, list[Values]]:
    """Side -> its figures, one entry per round.

    Args:
        note: called with each step as text.
        run: runs a side, given its name and command; callers may measure something else around it.
    """
    values: dict[str, list[Values]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name, command in sides.items():
            note(f"round {turn + 1} of {rounds}: {name}")
            values[name].append(values_of(run(name, command)))
    return values


def ratio_row(figure: str, baseline: Sequence[Values], side: Sequence[Values]) -> dict[str, Any]:
    """How many times better a side is: {"figure", "unit", "baseline" and "side" (medians), "better", "lowest", "highest"}."""
    kind = METRICS[figure]
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


def ratio_rows(values: Mapping[str, Sequence[Values]], baseline: str, figures: Sequence[str]) -> list[dict[str, Any]]:
    """A row for every side except the baseline and every figure that both have."""
    return [
        {"against": baseline, "name": name, **ratio_row(figure, values[baseline], rounds)}
        for name, rounds in values.items()
        if name != baseline
        for figure in figures
        if figure in rounds[0] and figure in values[baseline][0]
    ]
