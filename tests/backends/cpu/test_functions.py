"""Stateless ops: native against the reference, for every kind of row that the kernels write."""

from __future__ import annotations

import pytest
import torch

from deepseek_optimizer.backends.base import PREFILL
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.backends.reference.ops import FUNCTIONS
from deepseek_optimizer.graph.analysis import weight_shapes
from deepseek_optimizer.graph.ir import CacheSpec, Graph, Node, Value
from deepseek_optimizer.graph.ops import OPS
from support.models import assert_close_rows
from support.steps import Part, make_batch, runner

from .packing import dequantized, packed_weights

HIDDEN, VOCAB, TOKENS = 40, 23, 70
ATTRIBUTES = {"columns": {"groups": 4, "begin": 3, "end": 8}}
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "int8": 1e-3, "int4": 6e-2}  # see test_families


def graph_of(name: str) -> Graph:
    """logits = head(down(op(w0 x, w1 x, ..)))."""
    count = len(OPS[name].inputs)
    x = Value("x", HIDDEN)
    inputs = tuple(Value(f"in{i}", HIDDEN) for i in range(count))
    width = {"concat": HIDDEN * count, "columns": 4 * 5}.get(name, HIDDEN)
    y, z, logits = Value("y", width), Value("z", HIDDEN), Value("logits", VOCAB)
    nodes = [
        Node("embedding", (), (x,), ("embed",), {"scale": 1.0}),
        Node("linear", (x,), inputs, tuple(f"w{i}" for i in range(count)), {"biases": (None,) * count}),
        Node(name, inputs, (y,), attrs=ATTRIBUTES.get(name, {attr.name: 0.7 for attr in OPS[name].attrs})),
        Node("hidden_out", (inputs[-1],), attrs={"index": 0}),
        Node("linear", (y,), (z,), ("down",), {"biases": (None,)}),
        Node("lm_head", (z,), (logits,), ("head",), {"bias": None}),
    ]
    return Graph("functions", nodes, VOCAB, HIDDEN, 1, CacheSpec(1, 1, 8), 128)


@pytest.mark.parametrize("format_name", TOLERANCE)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_against_the_reference(backend, name, format_name):
    graph, generator = graph_of(name), torch.Generator().manual_seed(3)
    shapes = weight_shapes(graph)
    weights = packed_weights({n: torch.randn(s, generator=generator) / s[1] ** 0.5 for n, s in shapes.items()}, format_name)
    ids = torch.randint(VOCAB, (TOKENS,), generator=generator).tolist()
    actual = []
    for r in runner(backend, graph, weights), runner(ReferenceBackend(), graph, dequantized(weights)):
        actual.append(r.plan.run(make_batch([Part(r.sequence(), ids, PREFILL)], r.store), r.store).logits)
    assert_close_rows(*actual, TOLERANCE[format_name])
