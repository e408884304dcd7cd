"""Predicts the speed of a plan on machines that are not there: more cores, more memory nodes, faster memory.

A decode step takes

    t = token + sum over stages of (hand_over(n) + bytes / rate(n) + rows * row(n)) + cache / cache_rate(n)

`rate(n)` is at how many bytes per second n threads compute products with one row, and `row(n)` what each row of a matrix
takes besides, such as its sum at the end: short rows are slower. `cache_rate(n)` is at how many bytes per second they attend.
Rates of n threads are n times that of one while there are few, and at most a share of what the memory delivers; between the
two, a smooth minimum. A stage with fewer tasks than threads leaves some idle, and the last round of tasks may be partial.

`hand_over(n)` is what it costs to give n threads new work. It is measured for the threads of this machine. For more, there are
two bounds: each further thread costs what the second one did, one after the other; or they are in a tree. Across memory nodes,
a cache line takes longer. Nobody has checked either on a machine with many cores.

What is measured is in `Costs`; `scaling_costs.py` measures it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .step_work import Stage, StepWork

_SHARPNESS = 4.0  # of the smooth minimum: where both limits are equal, the rate is 2^(-1/4) = 0.84 times each
_REACHED = 0.9  # of the memory's bandwidth, by products: what docs/performance.md has, 74% to 100%
_ACROSS = 2.0  # times the cost of a cache line from another core of the same node: what is read from the other node


@dataclass(frozen=True)
class Costs:
    """What was measured on a machine.

    Attributes:
        product_gb_s: number of threads -> GB/s of packed weights in products with one row of the input.
        product_tera: 1e12 multiplications and additions per second of products with many rows, by one thread.
        hand_over_s: number of threads -> seconds of a stage without work.
        token_s: seconds per token outside the plan.
        read_gb_s: GB/s that the memory delivers to all threads.
        cpu: of the machine.
        row_s: number of threads -> seconds of each row of a matrix, besides its bytes. Empty: none.
        cache_gb_s: number of threads -> GB/s of the cache that attention reads. Empty: as fast as products.
    """

    product_gb_s: Mapping[int, float]
    product_tera: float
    hand_over_s: Mapping[int, float]
    token_s: float
    read_gb_s: float
    cpu: str = ""
    row_s: Mapping[int, float] = field(default_factory=dict)
    cache_gb_s: Mapping[int, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Costs:
        """The inverse of `to_dict`, also of what went through JSON.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """

        def by_threads(name: str) -> dict[int, float]:
            return {int(n): float(x) for n, x in value[name].items()}

        products, hand_overs, rows, caches = map(by_threads, ("product_gb_s", "hand_over_s", "row_s", "cache_gb_s"))
        tera, token, read = (float(value[name]) for name in ("product_tera", "token_s", "read_gb_s"))
        return cls(products, tera, hand_overs, token, read, str(value.get("cpu", "")), rows, caches)


@dataclass(frozen=True)
class Machine:
    """A machine.

    Attributes:
        cores: physical ones that the model uses, of all nodes.
        gb_s: what its memory delivers, of all nodes together.
        nodes: memory nodes; each stage's weights are split among them.
        speed: of a core, relative to one of the measured machine.
    """

    cores: int
    gb_s: float
    nodes: int = 1
    speed: float = 1.0


@dataclass(frozen=True)
class Prediction:
    """Attributes:
    low, high: decoded tokens per second of all sequences, by the two bounds of a hand-over's cost.
    shares: what the time of the step goes to, by the middle of the bounds: "weights", "cache", "hand-overs", "outside".
    """

    low: float
    high: float
    shares: Mapping[str, float] = field(default_factory=dict)

    @property
    def middle(self) -> float:
        """Their harmonic mean: that of the middle of the two times."""
        return 2 / (1 / self.low + 1 / self.high)


def predict(work: StepWork, costs: Costs, machine: Machine) -> Prediction:
    """The speed of decoding on a machine."""
    rate = product_rate(costs, machine)
    weights = sum(_product_seconds(stage, costs, machine, rate) for stage in work.stages)
    cache = work.cache_bytes / (1e9 * cache_rate(costs, machine))
    outside = costs.token_s / machine.speed
    best, worst = (work.hand_overs * each / machine.speed for each in hand_over(costs, machine))
    low, high = (work.batch / (outside + weights + cache + waits) for waits in (worst, best))
    waits = (best + worst) / 2
    total = outside + weights + cache + waits
    shares = {"weights": weights / total, "cache": cache / total, "hand-overs": waits / total, "outside": outside / total}
    return Prediction(low, high, shares)


def predict_prefill(operations: float, costs: Costs, machine: Machine, stages: int = 0) -> float:
    """Seconds of a prompt.

    Args:
        operations: of the whole prompt, see `Traffic.prefill_operations`.
        stages: hand-overs on the way.
    """
    tera = costs.product_tera * machine.speed * machine.cores
    return operations / (1e12 * tera) + stages * max(hand_over(costs, machine)) / machine.speed


def product_rate(costs: Costs, machine: Machine) -> float:
    """GB/s at which all cores compute products with one row."""
    return _rate(costs.product_gb_s, costs, machine)


def cache_rate(costs: Costs, machine: Machine) -> float:
    """GB/s at which all cores attend to the cache."""
    return _rate(costs.cache_gb_s or costs.product_gb_s, costs, machine)


def _rate(measured: Mapping[int, float], costs: Costs, machine: Machine) -> float:
    if machine.cores in measured and _is_measured(costs, machine):
        return measured[machine.cores]
    return _smooth_minimum(_together(measured, machine), _REACHED * machine.gb_s)


def _is_measured(costs: Costs, machine: Machine) -> bool:
    return machine.speed == 1 and machine.gb_s == costs.read_gb_s and machine.nodes == 1


def _together(measured: Mapping[int, float], machine: Machine) -> float:
    """GB/s of all cores if the memory were no limit."""
    least = min(measured)
    return machine.cores * machine.speed * measured[least] / least


def _row_s(costs: Costs, machine: Machine, used: int) -> float:
    if not costs.row_s:
        return 0.0
    if used in costs.row_s and _is_measured(costs, machine):
        return costs.row_s[used]
    least = min(costs.row_s)
    return costs.row_s[least] * least / (used * machine.speed)


def hand_over(costs: Costs, machine: Machine) -> tuple[float, float]:
    """Seconds of a stage's hand-over: by a tree, and one thread after the other."""
    n, known = machine.cores, costs.hand_over_s
    if n in known:
        return known[n], known[n]
    most = max(known)
    each = max(0.0, (known[most] - known[min(known)]) / (most - min(known))) if len(known) > 1 else known[most] / most
    per_node = n / machine.nodes
    across = _ACROSS if machine.nodes > 1 else 1.0
    near = per_node - most
    far = n - per_node
    line = known[most] + each * (near + across * far)
    tree = known[most] + each * (math.log2(max(per_node, most) / most) + across * math.log2(machine.nodes))
    return min(tree, line), max(tree, line)


def _product_seconds(stage: Stage, costs: Costs, machine: Machine, rate: float) -> float:
    n = machine.cores
    used = min(n, stage.tasks)
    rounds = math.ceil(stage.tasks / n) * n / stage.tasks  # 1 where all threads have equally many tasks
    idle = rounds if used == n else 1.0
    if used < n:  # idle threads read nothing
        rate = _smooth_minimum(rate * used / n * max(1.0, _headroom(costs, machine)), rate)
    read = stage.bytes / (1e9 * rate)
    compute = stage.operations / (1e12 * costs.product_tera * machine.speed * used)
    # Tasks are stolen: a partial last round costs the part by which computing, not memory, is the limit.
    return max(read + stage.rows * _row_s(costs, machine, used), compute * idle)


def _headroom(costs: Costs, machine: Machine) -> float:
    """By how many times the cores together are faster than the memory: so many fewer reach the same."""
    return _together(costs.product_gb_s, machine) / product_rate(costs, machine)


def _smooth_minimum(a: float, b: float) -> float:
    p = _SHARPNESS
    return float((a**-p + b**-p) ** (-1 / p))
