"""CPU use by other processes, which makes timings unreliable."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

_SAMPLE_S = 0.3  # seconds over which the use before a measurement is taken


class CpuTimes(NamedTuple):
    """Seconds. wall: a clock. busy: by all processes on the CPUs that this process may run on, time stolen by a hypervisor
    included. own: by this process and its children that have ended."""

    wall: float
    busy: float
    own: float


def cpu_times() -> CpuTimes | None:
    """The times now; None where the system is not Linux."""
    try:
        usable = {f"cpu{i}" for i in os.sched_getaffinity(0)}
        tick = os.sysconf("SC_CLK_TCK")
        lines = [line.split() for line in Path("/proc/stat").read_text(encoding="utf-8").splitlines()]
    except (OSError, AttributeError):
        return None
    busy = 0
    for words in lines:
        if words and words[0] in usable:
            user, nice, system, _idle, _wait, irq, softirq, steal = map(int, words[1:9])
            busy += user + nice + system + irq + softirq + steal
    return CpuTimes(time.perf_counter(), busy / tick, sum(os.times()[:4]))


def used_by_others(start: CpuTimes | None, end: CpuTimes | None) -> float | None:
    """CPUs that other processes used on average between two times; None if either is unknown."""
    if start is None or end is None or end.wall <= start.wall:
        return None
    return max(0.0, (end.busy - start.busy) - (end.own - start.own)) / (end.wall - start.wall)


class BackgroundLoad:
    """Watches a measurement: samples the other processes for a moment at construction, and then until `report`.

    Args:
        cores: number of CPUs that this process may run on.
        read: see `cpu_times`.
    """

    def __init__(self, cores: int, read: Callable[[], CpuTimes | None] = cpu_times, sample_s: float = _SAMPLE_S) -> None:
        self._cores, self._read = cores, read
        self._load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        first = read()
        time.sleep(sample_s)
        self._start = read()
        self._before = used_by_others(first, self._start)

    def report(self) -> dict[str, Any]:
        """Keys: cores; load_average (of the minute before); others_before and others_during (CPUs that other processes used on
        average); each of these None if unknown; busy (reasons why timings are unreliable; empty if the machine was idle)."""
        during = used_by_others(self._start, self._read())
        return {
            "cores": self._cores,
            "load_average": self._load_average,
            "others_before": self._before,
            "others_during": during,
            "busy": [*self.busy_before(), *self._above_threshold(during, "during")],
        }

    def busy_before(self) -> list[str]:
        """Reasons that are known before anything is measured."""
        reasons = self._above_threshold(self._before, "before")
        if self._load_average is not None and self._load_average > self._cores:
            reasons.append(
                f"the load average was {self._load_average:.1f} on {self._cores} cores in the minute before the measurement"
            )
        return reasons

    def _above_threshold(self, others: float | None, when: str) -> list[str]:
        if others is None or others <= max(0.25, 0.05 * self._cores):
            return []
        return [f"other processes used {others:.1f} of {self._cores} cores {when} the measurement"]
