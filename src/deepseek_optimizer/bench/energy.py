"""Energy measured by RAPL, the CPU's own counters, if Linux exposes them and this user may read them."""

from __future__ import annotations

import time
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class Energy:
    """Measures from construction on.

    Attributes:
        joules: energy of all CPU packages so far; None if no counter can be read.
        watts: mean power so far.
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        # Packages only ("intel-rapl:0"): domains within one ("intel-rapl:0:0") are part of it. AMD uses this name, too.
        self._domains = sorted(path for path in root.glob("*-rapl:*") if path.name.count(":") == 1 and "mmio" not in path.name)
        self._start = self._read()
        self._started = time.perf_counter()

    @property
    def joules(self) -> float | None:
        now = self._read()
        if not self._start or now is None or len(now) != len(self._start):
            return None
        # A counter wraps around to 0 after its maximum, which takes minutes at full power; at most one wrap is assumed.
        spent = [(b - a) % (top + 1) for (a, top), (b, _) in zip(self._start, now, strict=True)]
        return sum(spent) / 1e6

    @property
    def watts(self) -> float | None:
        joules, seconds = self.joules, time.perf_counter() - self._started
        return None if joules is None or seconds <= 0 else joules / seconds

    def _read(self) -> list[tuple[int, int]] | None:
        """(microjoules, maximum of the counter) of each package."""
        try:
            return [(_number(d / "energy_uj"), _number(d / "max_energy_range_uj")) for d in self._domains]
        except (OSError, ValueError):
            return None


def _number(path: Path) -> int:
    return int(path.read_text(encoding="utf-8"))
