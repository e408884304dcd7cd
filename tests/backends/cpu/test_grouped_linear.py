"""`grouped_linear`: products of groups of columns, with matrices of their own or with one that all share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepseek_optimizer.backends.base import DECODE, PREFILL
from deepseek_optimizer.backends.reference import ReferenceBackend
from deepseek_optimizer.graph.ir import CacheSpec, Graph, Node, Value
from deepseek_optimizer.graph.validate import check_graph
from support.models import assert_close_rows
from support.steps import Part, run_step, runner

from .packing import dequantized, packed_weights

VOCAB = 90
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "int8": 1e-3, "int4": 1e-3}  # int4 reads rows of 16 bits here
SIZES = [(3, 40, 24), (4, 96, 50), (1, 33, 70)]  # groups, columns and rows of each


def graph_of(groups: int, cols: int, rows: int, shared: bool) -> Graph:
    """The hidden state is the product of the rows of a table."""
    x, y = Value("x", groups * cols), Value("y", groups * rows)
    nodes = [
        Node("lookup", (), (x,), ("table",), {"scale": 1.0, "entries": VOCAB}),
        Node("grouped_linear", (x,), (y,), ("w",), {"groups": groups, "shared": shared}),
        Node("hidden_out", (y,), attrs={"index": 0}),
    ]
    return Graph("grouped", nodes, VOCAB, y.width, 1, CacheSpec(1, 1, 8), 128)


def made(backend: Any, graph: Graph, weights: dict[str, Any], ids: list[int], phase: int) -> torch.Tensor:
    run = runner(backend, graph, weights)
    return run_step(run.plan, run.store, [Part(run.sequence(), ids, phase, rows=[])], last_hidden=True).last_hidden


@pytest.mark.parametrize("format_name", TOLERANCE)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("groups, cols, rows", SIZES)
def test_grouped_products(backend, groups, cols, rows, shared, format_name):
    graph, g = graph_of(groups, cols, rows, shared), torch.Generator().manual_seed(rows)
    check_graph(graph)
    table, w = torch.randn(VOCAB, groups * cols, generator=g), torch.randn(groups, rows, cols, generator=g) / cols**0.5
    weights = packed_weights({"w": w[0] if shared else w.flatten(0, 1)}, format_name) | packed_weights({"table": table}, "fp32")
    apart = packed_weights({"w": w[:1].expand(groups, -1, -1).flatten(0, 1).contiguous()}, format_name)
    ids = torch.randperm(VOCAB, generator=g)[:70].tolist()
    for phase, count in ((PREFILL, 70), (DECODE, 1), (DECODE, 5)):
        native = made(backend, graph, weights, ids[:count], phase)
        assert_close_rows(
            native, made(ReferenceBackend(), graph, dequantized(weights), ids[:count], phase), TOLERANCE[format_name]
        )
        if shared:  # the same bits as with copies of the matrix
            copies = made(backend, graph_of(groups, cols, rows, False), weights | apart, ids[:count], phase)
            assert torch.equal(native, copies)


def test_a_shared_matrix_of_another_size_is_refused(backend):
    graph = graph_of(3, 40, 24, True)
    weights = packed_weights({"w": torch.zeros(72, 40), "table": torch.zeros(VOCAB, 120)}, "fp32")
    with pytest.raises(ValueError, match="must have width 216"):
        runner(backend, graph, weights)
