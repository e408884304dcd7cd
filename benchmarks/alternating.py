"""Times several functions in turns in one process, so that a machine whose speed varies slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Summary = dict[str, float]


def clock_of(busy: bool) -> Callable[[], float]:
    """Elapsed time, or the processor time of this process where others take turns on its cores."""
    return time.process_time if busy else time.perf_counter


def alternate(
    sides: Mapping[str, Callable[[], Any]],
    rounds: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    *,
    warm: bool = False,
) -> dict[str, list[float]]:
    """Seconds of each call, by side: unless they are warm, each is called once without being timed; then once a round.

    Args:
        rounds: number of rounds.
        seconds: no further round begins after this time; there is always one.
        clock: measures a call.
    """
    begin = time.perf_counter()
    for run in () if warm else sides.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            start = clock()
            run()
            times[name].append(clock() - start)
        if time.perf_counter() - begin > seconds:
            break
    return times


def speedup(times: Mapping[str, list[float]], side: str, against: str) -> Summary:
    """How many times as fast `side` is: {"median", "low", "high"} of the rounds' ratios, and the number of rounds."""
    ratios = [theirs / ours for theirs, ours in zip(times[against], times[side], strict=True)]
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "rounds": float(len(ratios))}


def shown(name: str, value: Summary) -> str:
    return f"{name}: {value['median']:.2f}x ({value['low']:.2f} to {value['high']:.2f}, {value['rounds']:.0f} rounds)"
