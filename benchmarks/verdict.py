"""What a row's figures mean: what each side read, against what the machine can, and whether the bar was reached."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_optimizer.bench.against import Values, ratio_row

from .standing import Bar, Row

MAX = 0.85  # of the machine's own limit: no bar asks for more
REACHED, LIMITED, MISSED = "reached", "limited by the machine", "missed"


def median(values: Sequence[Values], figure: str) -> float:
    """Of the rounds."""
    return statistics.median(v[figure] for v in values)


def share(token_bytes: float, tokens_s: Sequence[float], machine_gb_s: Sequence[float]) -> dict[str, float]:
    """{"token_bytes", "read_gb_s", "machine_gb_s", "percent"} of a side that reads so much for each of so many tokens a second,
    each the median of the rounds; the machine's speed beside each round."""
    reached = [token_bytes * speed / 1e9 for speed in tokens_s]
    return {
        "token_bytes": token_bytes,
        "read_gb_s": statistics.median(reached),
        "machine_gb_s": statistics.median(machine_gb_s),
        "percent": statistics.median(100 * r / limit for r, limit in zip(reached, machine_gb_s, strict=True)),
    }


def judge(
    row: Row, found: Mapping[str, Sequence[Values]], ours: str, read: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """One entry a bar: the ratio to the faster of its rivals, what was asked for and the verdict.

    Args:
        found: label -> figures, one entry a round.
        ours: our own label.
        read: label -> `share`; empty where a row is not bound by reading.
    """
    return [_judge(row, bar, found, ours, read) for bar in row.bars]


def _judge(
    row: Row, bar: Bar, found: Mapping[str, Sequence[Values]], ours: str, read: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    fastest = max((rival.label for rival in bar.rivals), key=lambda label: median(found[label], row.figure))
    ratio = ratio_row(row.figure, found[fastest], found[ours])
    allowed = None
    if ours in read:  # the ratio at which ours would read at MAX of what the machine can
        allowed = MAX * read[ours]["machine_gb_s"] * 1e9 / read[ours]["token_bytes"] / ratio["baseline"]
    percent = read[ours]["percent"] if ours in read else 0.0
    enough = row.read_percent is None or percent >= row.read_percent
    reached = ratio["better"] >= bar.at_least or (bar.or_percent is not None and percent >= bar.or_percent)
    return {
        "against": fastest,
        "at_least": bar.at_least,
        "reach": bar.reach,
        "or_percent": bar.or_percent,
        "read_percent": row.read_percent,
        "allowed": allowed,
        **{name: ratio[name] for name in ("better", "lowest", "highest")},
        "verdict": verdict(reached, ratio["better"], allowed) if enough else MISSED,
    }


def verdict(reached: bool, better: float, allowed: float | None) -> str:
    """allowed: the ratio at which the machine's limit would be met as far as any bar asks; None: not known."""
    if reached:
        return REACHED
    return LIMITED if allowed is not None and allowed <= better else MISSED
