"""Plans of small models on this backend beside those of the reference, for the tests of whole plans."""

from __future__ import annotations

from typing import Any

import torch

from deepseek_optimizer.backends.base import DECODE, PREFILL
from deepseek_optimizer.backends.cuda.backend import CudaBackend
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.graph import rules
from deepseek_optimizer.graph.cache_groups import group_layers
from deepseek_optimizer.graph.ir import Graph
from deepseek_optimizer.models import build_graph
from support.models import assert_close_rows, random_ids, weights_of
from support.steps import Part, Runner, run_step

from ..cpu.packing import dequantized, packed_weights

# Of a row's largest logit: what rounding to bf16 costs.
FORMAT_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "int8": 2e-2, "int4": 2e-2}
BF16_CACHE = 2e-2


def graph_of(model: Any, fused: bool = True) -> Graph:
    graph = build_graph(model.config)
    return group_layers(rules.apply(graph)[0] if fused else graph)


def pair(
    backend: CudaBackend, model: Any, format_name: str = "fp32", kv: str = "fp32", graph: Graph | None = None
) -> list[Runner]:
    """A runner of this backend, and one of the reference with the same values, and an fp32 cache unless this one is fp8, which
    costs more than other roundings."""
    graph, weights = graph or graph_of(model), packed_weights(weights_of(model), format_name)
    made, exact = backend.compile(graph, weights), ReferenceBackend().compile(graph, dequantized(weights))
    return [
        Runner(plan, owner.new_store(graph, dtype, 24, 16 if graph.states else 0), (None,) * graph.cache.groups)
        for plan, owner, dtype in ((made, backend, kv), (exact, ReferenceBackend(), kv if kv == "fp8" else "fp32"))
    ]


def stepwise(made: Runner, ids: list[int]) -> torch.Tensor:
    """The logits of a prompt in two chunks, then of a step of decoding."""
    blocks, logits = made.sequence(), []
    for begin, end, phase in ((0, 7, PREFILL), (7, -1, PREFILL), (-1, None, DECODE)):
        logits.append(run_step(made.plan, made.store, [Part(blocks, ids[begin:end], phase)]).logits)
    blocks.free()
    return torch.cat(logits).cpu()


def check_mixed_steps(backend: CudaBackend, model: Any) -> None:
    """See `check_mixed_steps_of`."""
    check_mixed_steps_of(pair(backend, model), model)


def check_mixed_steps_of(runners: list[Runner], model: Any) -> None:
    """Sequences that decode, one of them with a draft, beside prompts, of which one begins with a cached prefix.

    Args:
        runners: of this backend and of the reference.
    """
    results = []
    for made in runners:
        sequences = [made.sequence() for _ in range(4)]
        ids = [random_ids(model.config, count, seed) for seed, count in enumerate((34, 5, 9, 12))]
        parts = [Part(s, t[:-2]) for s, t in zip(sequences, ids, strict=True)][:3]
        first = run_step(made.plan, made.store, parts).logits
        parts = [
            Part(sequences[0], ids[0][-2:-1], DECODE), Part(sequences[1], ids[1][-2:], DECODE), Part(sequences[2], ids[2][-2:]),
            Part(sequences[3], ids[3], rows=[11]),
        ]  # fmt: skip
        results.append((first, run_step(made.plan, made.store, parts).logits))
    for made, exact in zip(*results, strict=True):
        assert_close_rows(made, exact, FORMAT_TOLERANCE["fp32"])
