"""How many layers each machine of a pipeline gets, by its memory and its speed.

A token passes through all machines one after another, so a step takes the sum of their times: layers go to the faster machines
as far as their memory allows. Among divisions that take the same time, the one that fills the fullest memory least is chosen;
on equal machines, that is the one whose largest share is smallest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

_CLASS = 1.25  # speeds that differ by less than about half of this step are the same: measurements are not exact
_SLOWER = 1.02  # a division may take so much longer than the fastest one
_HALVINGS = 40  # of the interval in which the least possible fill is searched


@dataclass(frozen=True)
class Machine:
    """What a process of a pipeline has.

    Attributes:
        memory: bytes that its weights may take.
        speed: bytes of weights that it reads per second.
    """

    memory: int
    speed: float


def layer_ends(sizes: Sequence[int], machines: Sequence[Machine]) -> list[int]:
    """Divides layers among machines, in order; each gets at least one.

    Args:
        sizes: bytes of each layer's weights; at least as many as machines.
        machines: in the order of the pipeline. If their memory is too small, the fullest one exceeds it least.

    Returns:
        The end of each machine's layers.
    """
    fastest = max(machine.speed for machine in machines)
    speeds = [_CLASS ** round(math.log(machine.speed / fastest, _CLASS)) for machine in machines]
    memory = [max(1, machine.memory) for machine in machines]

    def divided(fill: float) -> tuple[float, list[int]]:
        return _fastest(sizes, speeds, [fill * most for most in memory])

    most = max(1.0, sum(sizes) / min(memory))
    limit = 1.0 if math.isfinite(divided(1.0)[0]) else _least(lambda fill: math.isfinite(divided(fill)[0]), most)
    longest = divided(limit)[0] * _SLOWER
    return divided(_least(lambda fill: divided(fill)[0] <= longest, limit))[1]


def _least(holds: Callable[[float], bool], most: float) -> float:
    """The least number up to `most`, for which it holds, from which on it holds."""
    below = 0.0
    for _ in range(_HALVINGS):
        middle = (below + most) / 2
        if holds(middle):
            most = middle
        else:
            below = middle
    return most


def _fastest(sizes: Sequence[int], speeds: Sequence[float], limits: Sequence[float]) -> tuple[float, list[int]]:
    """The time of the fastest division within the limits, and the end of each part; infinite if there is none."""
    sums = [0, *accumulate(sizes)]
    count = len(sizes)
    best: list[tuple[float, list[int]]] = [(0.0, []), *[(math.inf, [])] * count]  # of the first layers, in so many parts
    for speed, limit in zip(speeds, limits, strict=True):
        longer: list[tuple[float, list[int]]] = [(math.inf, [])] * (count + 1)
        for end in range(1, count + 1):
            begins = [begin for begin in range(end) if sums[end] - sums[begin] <= limit and math.isfinite(best[begin][0])]
            if begins:
                time, begin = min((best[begin][0] + (sums[end] - sums[begin]) / speed, begin) for begin in begins)
                longer[end] = time, [*best[begin][1], end]
        best = longer
    return best[count]
