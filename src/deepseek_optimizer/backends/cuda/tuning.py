"""The search for the division that is fastest on a card: one setting after the other, in pairs with the best so far.

No Triton is imported here; how a division is measured is passed in.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .cost_table import ALLOWED
from .division import Division

PAIRS = 5
MARGIN = 0.02  # improvements up to this are noise
_PROGRAMS = (0.5, 2.0)  # times the number so far

Work = Literal["decode", "prompt"]
Measure = Callable[[Division, Work], float]

# What each setting affects.
WORK: dict[str, Work] = {
    "programs": "decode", "most_splits": "decode", "vector_warps": "decode", "chunk_blocks": "decode", "block_n": "prompt",
    "tile_warps": "prompt", "tile_stages": "prompt",
}  # fmt: skip


@dataclass(frozen=True)
class Gain:
    """A setting that was changed.

    Attributes:
        setting, before, after: its name and values.
        gain: by how much its work became faster: 0.1: it took 1.1 times as long before.
    """

    setting: str
    before: int
    after: int
    gain: float


def tune(measure: Measure, start: Division, note: Callable[[str], None] = lambda _: None) -> tuple[Division, list[Gain]]:
    """Finds a division.

    A value replaces the one so far if it is faster in each of `PAIRS` pairs of measurements, and by more than `MARGIN` by their
    median. In half of the pairs it comes first.

    Args:
        measure: seconds of a kind of work with a division. A RuntimeError, such as too little shared memory, or a lack of
            memory rules the division out.
        start: where to begin; its own measurements must succeed.
        note: called with progress.

    Returns: the best division, and what was changed.
    """
    best, gains = start, []
    for setting, work in WORK.items():
        for value in _candidates(setting, getattr(best, setting)):
            candidate = replace(best, **{setting: value})
            gain = _gain(measure, best, candidate, work)
            before = getattr(best, setting)
            if gain is None or gain <= MARGIN:
                note(f"{setting}={value}: {'impossible' if gain is None else 'not faster'}")
                continue
            note(f"{setting}={value}: {gain:.1%} faster than {before}")
            gains.append(Gain(setting, before, value, gain))
            best = candidate
    return best, gains


def _candidates(setting: str, so_far: int) -> Sequence[int]:
    allowed = ALLOWED[setting]
    values = [max(1, round(so_far * factor)) for factor in _PROGRAMS] if allowed is None else allowed
    return [value for value in values if value != so_far]


def _gain(measure: Measure, best: Division, candidate: Division, work: Work) -> float | None:
    """The median gain of the pairs; 0 if it is not faster in all; None: the candidate cannot run."""
    try:
        measure(candidate, work)  # compiles its kernels
    except (RuntimeError, MemoryError):
        return None
    measure(best, work)
    gains = []
    for pair in range(PAIRS):
        order = (candidate, best) if pair % 2 else (best, candidate)
        seconds = {division: measure(division, work) for division in order}
        gains.append(seconds[best] / seconds[candidate] - 1)
        if gains[-1] <= 0:
            return 0.0
    return statistics.median(gains)
