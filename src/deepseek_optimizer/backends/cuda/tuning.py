"""The search for what is fastest on a card: a division, one setting after the other, in pairs with the best so far, and then
alternatives to kernels, in pairs with the kernels.

No Triton is imported here; how a division is measured is passed in.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from .cost_table import ALLOWED
from .division import Division

PAIRS = 5
MARGIN = 0.02  # improvements up to this are noise
ROWS = (512, 256, 64, 16)  # of steps that alternatives are measured with
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


def faster_rows(
    measure: Callable[[str | None, int], float], name: str, note: Callable[[str], None] = lambda _: None
) -> tuple[int, float] | None:
    """From how many rows of a step on an alternative is faster, by the rule of `tune`: at each of `ROWS` that is not fewer.

    Args:
        measure: seconds of a step of a number of rows with an alternative, or with None the kernel that it replaces. Errors as
            in `tune`.
        name: of the alternative.
        note: called with progress.

    Returns: the number, and by how much the step of the most rows became faster; None: it is not used.
    """
    found = None
    for rows in ROWS:
        gain = _gain_of(partial(measure, name, rows), partial(measure, None, rows))
        if gain is None or gain <= MARGIN:
            note(f"{name}, {rows} rows: {'impossible' if gain is None else 'not faster'}")
            break
        note(f"{name}, {rows} rows: {gain:.1%} faster than the kernel")
        found = rows, gain if found is None else found[1]
    return found


def _candidates(setting: str, so_far: int) -> Sequence[int]:
    allowed = ALLOWED[setting]
    values = [max(1, round(so_far * factor)) for factor in _PROGRAMS] if allowed is None else allowed
    return [value for value in values if value != so_far]


def _gain(measure: Measure, best: Division, candidate: Division, work: Work) -> float | None:
    """The median gain of the pairs; 0 if it is not faster in all; None: the candidate cannot run."""
    return _gain_of(lambda: measure(candidate, work), lambda: measure(best, work))


def _gain_of(candidate: Callable[[], float], best: Callable[[], float]) -> float | None:
    """The same, for two functions that measure."""
    try:
        candidate()  # compiles its kernels
    except (RuntimeError, MemoryError):
        return None
    best()
    gains = []
    for pair in range(PAIRS):
        order = (candidate, best) if pair % 2 else (best, candidate)
        seconds = {each: each() for each in order}
        gains.append(seconds[best] / seconds[candidate] - 1)
        if gains[-1] <= 0:
            return 0.0
    return statistics.median(gains)
