"""Measures what `scaling.py` predicts from: products from DRAM, hand-overs, and what a token takes outside the plan.

None of it comes from the model whose speed is predicted. Products are those of matrices larger than caches. A hand-over is the
difference between small models with few and with many layers, whose weights are in the caches.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from .hardware import cpu_name, usable_cpus
from .machine_limits import best_seconds, read_gb_s
from .runs import repeated
from .scaling import Costs
from .step_work import StepWork, step_work
from .work import Work

_ROWS, _COLS, _MATRICES = 16384, 4096, 5  # in int4 38 MB each: together more than most caches
_MANY, _SQUARE = 256, 2048  # rows of a prompt, and a matrix that fits a cache
_BANDWIDTH_BYTES = 512 << 20
_LAYERS = (4, 36)
_WORK = Work(prompt=8, new=48)
_REPEATS = 5


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
        seconds: of each measurement.
        note: called with what is measured next.

    Raises:
        BackendError: the native library is missing.
    """
    threads = sorted(set(threads or _doubled(usable_cpus())))
    products, hand_overs, outside = {}, {}, []
    for n in threads:
        note(f"products with {n} threads")
        products[n] = product_gb_s(precision, n, seconds)
    for n in threads:
        note(f"hand-overs with {n} threads")
        hand_overs[n], token = hand_over_s(n, products[n])
        outside.append(token)
    note("products with many rows, and the memory")
    return Costs(
        products, product_tera(precision, seconds), hand_overs, statistics.median(outside),
        read_gb_s(_BANDWIDTH_BYTES, max(threads), seconds), cpu_name(),
    )  # fmt: skip


def _doubled(most: int) -> list[int]:
    return [n for n in (1 << i for i in range(12)) if n < most] + [most]


def product_gb_s(precision: str, threads: int, seconds: float = 1.0) -> float:
    """GB/s of packed weights in products with one row, of matrices that are read from DRAM."""
    backend, matrices, x = _matrices(precision, threads, _ROWS, _COLS, _MATRICES, 1)

    def work() -> None:
        for matrix in matrices:
            backend.linear(x, matrix)

    return sum(matrix.nbytes for matrix in matrices) / best_seconds(work, seconds) / 1e9


def product_tera(precision: str, seconds: float = 1.0) -> float:
    """1e12 multiplications and additions per second of one thread, in products with many rows."""
    backend, (matrix,), x = _matrices(precision, 1, _SQUARE, _SQUARE, 1, _MANY)
    return 2 * _MANY * _SQUARE**2 / best_seconds(lambda: backend.linear(x, matrix), seconds) / 1e12


def _matrices(precision: str, threads: int, rows: int, cols: int, count: int, inputs: int) -> tuple[Any, list[Any], Any]:
    """The backend, `count` random matrices in this format, and rows to multiply them with."""
    import torch

    from ..backends.cpu import CpuBackend
    from ..quant import PackedMatrix

    backend, generator = CpuBackend(threads=threads), torch.Generator().manual_seed(0)
    weight = torch.randn(rows, cols, generator=generator, dtype=torch.float32, device="cpu") / 50
    data = backend.pack(weight, precision)
    matrices = [PackedMatrix(precision, rows, cols, data.clone()) for _ in range(count)]
    return backend, matrices, torch.randn(inputs, cols, generator=generator, dtype=torch.float32, device="cpu")


def hand_over_s(threads: int, gb_s: float) -> tuple[float, float]:
    """Seconds of a stage without work, and of a token outside the plan.

    Args:
        threads: that get work.
        gb_s: of products with so many threads; what reading the small models' weights takes is subtracted.
    """
    works: list[StepWork] = []
    times: list[float] = []
    for layers in _LAYERS:
        model = _small_model(layers, threads)
        works.append(step_work(model, _WORK))
        runs = [run.tpot_s for run in repeated(model, _WORK, repeats=_REPEATS)]
        reading = (works[-1].weight_bytes + works[-1].cache_bytes) / (1e9 * gb_s)
        times.append(statistics.median(t for t in runs if t is not None) - reading)
    stages = [work.hand_overs for work in works]
    each = max(1e-8, (times[1] - times[0]) / (stages[1] - stages[0]))
    return each, max(0.0, times[0] - each * stages[0])


def _small_model(layers: int, threads: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ..config import DeepSeekConfig
    from ..optimized_model import DynamicGraphOptimizer

    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, max_position_embeddings=256,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    settings = DeepSeekConfig(precision="int4", threads=threads, kv_cache_memory=1 << 24)
    return DynamicGraphOptimizer(model, config=settings).optimize()
