"""The host's work in a replayed step of decoding of backend `cuda`, in microseconds of processor time.

    TRITON_INTERPRET=1 python -m benchmarks.cuda_host_time [--rows 1 4] [--layers 1] [--steps 500]

No card is needed. The device is one that replays nothing, so what is measured is the check of the step, its integers, the
copies on the host and the results; a card's driver adds one call for the copy, the graph and the wait each. The first two steps
run in Triton's interpreter, which takes minutes with many rows or layers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from deepseek_optimizer.backends.base import DECODE, StepBatch
from deepseek_optimizer.backends.cuda.backend import CudaBackend
from deepseek_optimizer.backends.cuda.device import InterpreterDevice
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.analysis import weight_shapes
from deepseek_optimizer.graph.cache_groups import group_layers
from deepseek_optimizer.models import build_graph
from deepseek_optimizer.quant import pack
from deepseek_optimizer.system.processor import cpu_name

_CPU = torch.device("cpu")
_CONTEXT = 1000  # tokens of each sequence
_VOCABULARY = 64
_WARM = 3


class Idle(InterpreterDevice):
    """A device whose captured steps do nothing."""

    captures = True

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        launch()
        return lambda: None


def step_times(rows: int, layers: int, steps: int) -> list[float]:
    """Microseconds of this many steps of `rows` sequences, of a Llama with so many layers of the smallest size."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=_VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    backend = CudaBackend(_CPU, True, Idle(_CPU))
    graph = group_layers(rules.apply(build_graph(config))[0])
    zeros = {name: torch.zeros(shape) for name, shape in weight_shapes(graph).items()}
    plan = backend.compile(graph, {name: pack(w, "fp32") if w.ndim == 2 else w for name, w in zeros.items()})
    blocks = -(-(_CONTEXT + 1) // 32)
    store = backend.new_store(graph, "bf16", rows * blocks)
    batch, taken = _batch(rows, blocks), []
    for number in range(_WARM + steps):
        began = time.thread_time_ns()
        plan.run(batch, store)
        if number >= _WARM:
            taken.append((time.thread_time_ns() - began) / 1e3)
    return taken


def _batch(rows: int, blocks: int) -> StepBatch:
    def of(value: int) -> np.ndarray:
        return np.full(rows, value, np.int32)

    table, each = np.arange(rows * blocks, dtype=np.int32).reshape(rows, blocks), np.arange(rows, dtype=np.int32)
    logits = torch.zeros(rows, _VOCABULARY)
    return StepBatch(of(0), of(_CONTEXT), of(1), of(_CONTEXT), of(DECODE), table, each, logits=logits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=500)
    given = parser.parse_args()
    print(cpu_name())
    for rows in given.rows:
        taken = step_times(rows, given.layers, given.steps)
        print(f"{rows} rows, {given.layers} layers: median {statistics.median(taken):.0f} us, fastest {min(taken):.0f} us")


if __name__ == "__main__":
    main()
