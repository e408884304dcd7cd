"""Measures what `scaling.py` predicts from: what a decode step takes for each byte, row and stage, and outside the plan.

None of it comes from the model whose speed is predicted. Five small models with random weights are timed in turns; each of them
has much of another part of a step, and the least squares of their times, with no part below zero, are the costs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .hardware import cpu_name, usable_cpus
from .least_squares import nonnegative_least_squares
from .machine_limits import best_seconds, read_gb_s
from .runs import repeated
from .scaling import Costs
from .step_work import StepWork, step_work
from .work import Work

_MANY, _SQUARE = 256, 2048  # rows of a prompt, and a matrix that fits a cache
_BANDWIDTH_BYTES = 512 << 20
_REPEATS = 5
_NEW = 48


@dataclass(frozen=True)
class Shape:
    """A model that is timed: the sizes of its config, the length of its context, and the format of its weights; None: that of
    the model to predict. Those formats need multiples of 256."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    prompt: int = 8
    format: str | None = None


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "few stages": Shape(64, 64, 4, 2, 1, format="int4"),
        "many stages": Shape(64, 64, 36, 2, 1, format="int4"),
        "long rows": Shape(3072, 8192, 3, 24, 8),
        "short rows": Shape(512, 1536, 40, 8, 4),
        "long context": Shape(512, 256, 16, 16, 4, 1536),
    }
)


def measure_costs(
    threads: Sequence[int] | None = None,
    precision: str = "int4",
    seconds: float = 1.0,
    note: Callable[[str], None] = lambda _: None,
) -> Costs:
    """Measures this machine, which nothing else may use meanwhile. Takes about a minute.

    Args:
        threads: numbers of threads to measure with; None: 1, 2, 4, ... and all.
        precision: format of the products: that of the model to predict.
        seconds: of each measurement other than the models' runs.
        note: called with what is measured next.

    Raises:
        BackendError: the native library is missing.
    """
    threads = sorted(set(threads or _doubled(usable_cpus())))
    fitted = {n: fit(*steps) for n, steps in _timed_steps(threads, precision, note).items()}
    note("products with many rows, and the memory")
    return Costs(
        {n: 1e-9 / found.byte_s for n, found in fitted.items()},
        product_tera(precision, seconds),
        {n: found.hand_over_s for n, found in fitted.items()},
        statistics.median(found.token_s for found in fitted.values()),
        read_gb_s(_BANDWIDTH_BYTES, max(threads), seconds),
        cpu_name(),
        row_s={n: found.row_s for n, found in fitted.items()},
        cache_gb_s={n: 1e-9 / found.cache_byte_s for n, found in fitted.items()},
    )


def _doubled(most: int) -> list[int]:
    return [n for n in (1 << i for i in range(12)) if n < most] + [most]


@dataclass(frozen=True)
class StepCosts:
    """What parts of a decode step take with a number of threads, in seconds.

    Attributes:
        token_s: outside the plan.
        hand_over_s: of each stage.
        byte_s: of each byte of packed weights.
        row_s: of each row of a matrix.
        cache_byte_s: of each byte of the cache that attention reads.
    """

    token_s: float
    hand_over_s: float
    byte_s: float
    row_s: float
    cache_byte_s: float


def _parts(work: StepWork) -> list[float]:
    """How much a step has of each attribute of `StepCosts`."""
    return [1.0, work.hand_overs, work.weight_bytes, work.rows, work.cache_bytes]


def fit(works: Sequence[StepWork], seconds: Sequence[float]) -> StepCosts:
    """The costs, none below zero, by which the steps' times come out with the least squares of relative errors."""
    import numpy as np

    times = np.array(seconds, np.float64)
    parts = np.array([_parts(work) for work in works], np.float64) / times[:, None]
    costs = [float(x) for x in nonnegative_least_squares(parts, np.ones_like(times))]
    # Rates are divided by: what was too little to be seen is fast, not free.
    return StepCosts(costs[0], max(costs[1], 1e-8), max(costs[2], 1e-13), costs[3], max(costs[4], 1e-13))


def _timed_steps(
    threads: Sequence[int], precision: str, note: Callable[[str], None]
) -> dict[int, tuple[list[StepWork], list[float]]]:
    """Number of threads -> the work of a step of each of SHAPES, and its seconds: the median of runs in turns, since a machine
    that others use is not equally fast all the time."""
    models: dict[tuple[int, str], Any] = {}
    for name, shape in SHAPES.items():
        note(f"making a model with {name}")
        for n in threads:
            models[n, name] = _model(shape, n, precision)
    times: dict[tuple[int, str], list[float]] = {key: [] for key in models}
    for turn in range(_REPEATS + 1):  # the first warms up
        note(f"decoding in turns, {turn + 1} of {_REPEATS + 1}")
        for (n, name), model in models.items():
            (run,) = repeated(model, _work(SHAPES[name]), repeats=1, warmup=0, seed=turn)
            if turn and run.tpot_s is not None:
                times[n, name].append(run.tpot_s)
    return {
        n: (
            [step_work(models[n, name], _work(shape)) for name, shape in SHAPES.items()],
            [statistics.median(times[n, name]) for name in SHAPES],
        )
        for n in threads
    }


def _work(shape: Shape) -> Work:
    return Work(prompt=shape.prompt, new=_NEW)


def product_tera(precision: str, seconds: float = 1.0) -> float:
    """1e12 multiplications and additions per second of one thread, in products with many rows."""
    import torch

    from ..backends.cpu import CpuBackend
    from ..quant import PackedMatrix

    backend, generator = CpuBackend(threads=1), torch.Generator().manual_seed(0)
    weight = torch.randn(_SQUARE, _SQUARE, generator=generator, dtype=torch.float32, device="cpu") / 50
    matrix = PackedMatrix(precision, _SQUARE, _SQUARE, backend.pack(weight, precision))
    x = torch.randn(_MANY, _SQUARE, generator=generator, dtype=torch.float32, device="cpu")
    return 2 * _MANY * _SQUARE**2 / best_seconds(lambda: backend.linear(x, matrix), seconds) / 1e12


def _model(shape: Shape, threads: int, precision: str) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ..config import DeepSeekConfig
    from ..optimized_model import DynamicGraphOptimizer

    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, vocab_size=512,
        max_position_embeddings=shape.prompt + 256,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    settings = DeepSeekConfig(formats={"*": shape.format or precision}, threads=threads, kv_cache_memory=1 << 28)
    return DynamicGraphOptimizer(model, config=settings).optimize()
