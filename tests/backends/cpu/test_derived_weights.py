"""Weights in the forms that native steps read: parts of matrices, factors of norms, biases of zeros."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deepseek_optimizer.backends.cpu.derived_weights import with_derived_weights
from deepseek_optimizer.backends.cpu.packer import weight_struct
from deepseek_optimizer.backends.reference.ops import FUNCTIONS
from deepseek_optimizer.errors import BackendError
from deepseek_optimizer.graph.ir import CacheSpec, Graph, Node, Value
from deepseek_optimizer.quant import ColumnOrder, pack, unpack

WIDTH = 40


def graph_of(*nodes: Node) -> Graph:
    return Graph("test", list(nodes), 7, WIDTH, 1, CacheSpec(1, 1, 2), 16)


def product(parts, op="linear", biases=None, **attrs):
    """A product with `parts` (begin, end, total) of W."""
    x = Value("x", WIDTH)
    outputs = tuple(Value(f"y{i}", part[1] - part[0]) for i, part in enumerate(parts))
    attrs |= {"rows": tuple(parts), "biases": biases or (None,) * len(parts)}
    return Node(op, (x,), outputs[:1] if op == "gate_up" else outputs, ("W",) * len(parts), attrs)


@pytest.mark.parametrize("format_name", ["fp32", "int8", "int4"])
def test_rows_that_begin_at_a_tile_are_views(format_name):
    matrix = pack(torch.randn(75, WIDTH, generator=torch.Generator().manual_seed(0)), format_name)
    node = product([(0, 32, 75), (32, 48, 75), (48, 75, 75)], biases=("b",) * 3)
    graph, derived = with_derived_weights(graph_of(node), {"W": matrix, "b": torch.arange(75.0)})
    (changed,) = graph.nodes
    assert changed.weights == ("W[0:32]", "W[32:48]", "W[48:75]") and "rows" not in changed.attrs
    whole = unpack(matrix)
    for (begin, end, _), name, bias in zip(node.attrs["rows"], changed.weights, changed.attrs["biases"], strict=True):
        part = derived[name]
        assert part.data.untyped_storage().data_ptr() == matrix.data.untyped_storage().data_ptr(), "a view, not a copy"
        assert torch.equal(unpack(part), whole[begin:end])
        assert derived[bias].tolist() == list(range(begin, end))


def test_other_rows_are_cut_from_the_whole_product():
    graph, derived = with_derived_weights(graph_of(product([(0, 24, 60), (24, 60, 60)], biases=("b", "b"))), {})
    whole, first, second = graph.nodes
    assert derived == {} and whole.weights == ("W",) and whole.attrs == {"biases": ("b",)} and whole.outputs[0].width == 60
    assert [(n.op, n.attrs, n.outputs[0].name, n.outputs[0].width) for n in (first, second)] == [
        ("columns", {"groups": 1, "begin": 0, "end": 24}, "y0", 24),
        ("columns", {"groups": 1, "begin": 24, "end": 60}, "y1", 36),
    ]


def test_inputs_in_the_order_of_the_columns():
    """For a matrix whose columns are stored in another order, with two and with three runs in a group."""
    for order in (ColumnOrder(5, 2), ColumnOrder(4, 3)):
        width = 4 * order.groups * order.each
        stored = pack(torch.randn(7, width, generator=torch.Generator().manual_seed(0)), "fp32")
        x, y = Value("x", width), Value("y", 7)
        node = Node("linear", (x,), (y,), ("W",), {"biases": ("b",)})
        graph, derived = with_derived_weights(graph_of(node), {"W": replace(stored, order=order)})
        assert list(derived) == ["W as stored"]
        assert derived["W as stored"].data is stored.data and derived["W as stored"].order is None
        values = {x: torch.arange(2 * width).view(2, width)}
        for made in graph.nodes[:-1]:
            values[made.outputs[0]] = FUNCTIONS[made.op](*(values[v] for v in made.inputs), **made.attrs)
        assert graph.nodes[-1] == node.with_(inputs=graph.nodes[-2].outputs, weights=("W as stored",))
        assert torch.equal(values[graph.nodes[-2].outputs[0]], order.stored(values[x]))


def test_a_merged_product_does_not_read_another_order():
    stored = pack(torch.randn(7, WIDTH), "fp32")
    with pytest.raises(BackendError, match="in their stored order"):
        weight_struct(replace(stored, order=ColumnOrder(2, 2)))


@pytest.mark.parametrize("activation, op", [("silu", "swiglu"), ("gelu", "geglu")])
def test_gate_and_up_that_do_not_begin_at_a_tile(activation, op):
    node = product([(0, 24, 48), (24, 48, 48)], op="gate_up", activation=activation)
    graph, _ = with_derived_weights(graph_of(node), {})
    assert [n.op for n in graph.nodes] == ["linear", "columns", "columns", op]
    assert graph.nodes[-1].outputs == node.outputs


def test_factors_of_norms_and_biases_of_zeros():
    x, y = Value("x", WIDTH), Value("y", WIDTH)
    nodes = [
        Node("rms_norm", (x,), (y,), ("w",), {"eps": 1e-6, "unit_offset": True}),
        Node("rms_norm", (x,), (y,), ("w",), {"eps": 1e-6}),
        Node("layer_norm", (x,), (y,), ("w",), {"eps": 1e-6}),
        Node("head_norm", (x,), (y,), (), {"eps": 1e-6, "heads": 5, "head_dim": 8}),
    ]
    weight = torch.full((WIDTH,), 0.25, dtype=torch.bfloat16)
    graph, derived = with_derived_weights(graph_of(*nodes), {"w": weight})
    assert [n.weights for n in graph.nodes] == [("1 + w",), ("w",), ("w", "40 zeros"), ("8 ones",)]
    assert torch.equal(derived["1 + w"], torch.full((WIDTH,), 1.25)) and torch.equal(derived["40 zeros"], torch.zeros(WIDTH))
    assert torch.equal(derived["8 ones"], torch.ones(8))


def test_a_factor_that_is_a_parameter_becomes_a_constant():
    x, y = Value("x", WIDTH), Value("y", WIDTH)
    graph, _ = with_derived_weights(graph_of(Node("scale_by", (x,), (y,), ("s",))), {"s": torch.tensor([0.75])})
    assert graph.nodes == [Node("scale", (x,), (y,), attrs={"scale": 0.75})]


def test_weights_of_another_kind_are_refused():
    with pytest.raises(BackendError, match="'W' must be a packed matrix"):
        with_derived_weights(graph_of(product([(0, 16, 32), (16, 32, 32)])), {"W": torch.zeros(32, WIDTH)})
    norm = Node("rms_norm", (Value("x", WIDTH),), (Value("y", WIDTH),), ("w",), {"eps": 1e-6, "unit_offset": True})
    with pytest.raises(BackendError, match="'w' must be a vector"):
        with_derived_weights(graph_of(norm), {})
