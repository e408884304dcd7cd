"""Weights that native steps read in another form than the model holds them.

- A product with some rows of a matrix (attribute `rows`) reads a view of its tiles if the rows begin at a tile. Otherwise the
  whole matrix is multiplied, and `columns` nodes take the parts.
- A product with a matrix whose columns are stored in another order reads its input in that order.
- The factor of a norm with `unit_offset` is 1 + w.
- A layer norm without a bias has one of zeros, and a norm of heads without a weight one of ones.
- The factor of `scale_by` is a constant of the step, as in `scale`.
- A short convolution reads its weights tap after tap, and a delta rule A_log as a vector.
- The biases of `compress`, the table of `hash_router` and the limits of `clamp` are vectors.
- `grid_queries` reads its tables element after element of a head, so that the distances from a row are consecutive.
- Experts read the biases of all matrices as one vector, in the order of the packed stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ...errors import BackendError
from ...graph.ir import Graph, Node, Value
from ...graph.ops.products import GATED, rows_of
from ...quant.base import TILE_ROWS
from ...quant.packed import ColumnOrder, PackedMatrix, PackedWeight
from ...quant.transposed_stack import biases_of

Weights = dict[str, PackedWeight | torch.Tensor]


def with_derived_weights(graph: Graph, weights: Mapping[str, PackedWeight | torch.Tensor]) -> tuple[Graph, Weights]:
    """Returns the graph with the names of derived weights in its nodes, and these weights by name.

    Args:
        graph: the graph before lowering.
        weights: the model's weights by name.
    """
    derived: Weights = {}
    nodes = [part for node in graph.nodes for part in _derived(node, weights, derived)]
    return replace(graph, nodes=nodes), derived


def _derived(node: Node, weights: Mapping[str, PackedWeight | torch.Tensor], derived: Weights) -> list[Node]:
    if node.attrs.get("rows"):
        aligned = all(part is None or part[0] % TILE_ROWS == 0 for part in rows_of(node))
        return [_with_views(node, weights, derived)] if aligned else _whole_products(node)
    if node.op == "linear" and (order := _column_order(node, weights)) is not None:
        return _reordered(node, order, weights, derived)
    if node.attrs.get("unit_offset"):
        (name,) = node.weights
        derived[f"1 + {name}"] = 1 + _vector(weights, name).float()
        return [node.with_(weights=(f"1 + {name}",))]
    if node.op == "head_norm" and not node.weights:
        width = node.attrs["head_dim"]
        derived[f"{width} ones"] = torch.ones(width, dtype=torch.float32, device="cpu")
        return [node.with_(weights=(f"{width} ones",))]
    if node.op == "short_conv":
        (name,) = node.weights
        derived[f"taps of {name}"] = _vector(weights, name).float().squeeze(1).T.reshape(-1)
        return [node.with_(weights=(f"taps of {name}",))]
    if node.op == "delta_rule" and node.attrs["channels"]:
        a_log, dt_bias = node.weights
        derived[f"flat {a_log}"] = _vector(weights, a_log).flatten()
        return [node.with_(weights=(f"flat {a_log}", dt_bias))]
    if node.op in ("compress", "hash_router"):
        names = list(node.weights)
        flat = 0 if node.op == "compress" else 1
        derived[f"flat {names[flat]}"] = _vector(weights, names[flat]).flatten().float()
        names[flat] = f"flat {names[flat]}"
        return [node.with_(weights=tuple(names))]
    if node.op in ("experts_gate_up", "experts_down") and node.attrs.get("biases", (None,)) != (None,):
        (name,) = node.attrs["biases"]
        bias = _vector(weights, name)
        ordered = bias if node.attrs.get("layout", "rows") == "rows" else biases_of(bias, node.outputs[0].width)
        derived[f"flat {name}"] = ordered.flatten()
        return [node.with_(attrs={**node.attrs, "biases": (f"flat {name}",)})]
    if node.op == "clamp":
        for name in node.weights:
            derived[f"flat {name}"] = _vector(weights, name).float().reshape(1)
        return [node.with_(weights=tuple(f"flat {name}" for name in node.weights))]
    if node.op == "grid_queries":
        for name in node.weights:  # element d of all distances, from the largest one on
            derived[f"turned {name}"] = _vector(weights, name).float().flip(0).T.flatten()
        return [node.with_(weights=tuple(f"turned {name}" for name in node.weights))]
    if node.op == "scale_by":
        factor = float(_vector(weights, node.weights[0]))
        return [node.with_(op="scale", weights=(), attrs={"scale": factor})]
    if node.op == "layer_norm" and len(node.weights) == 1:
        width = node.inputs[0].width
        derived[f"{width} zeros"] = torch.zeros(width, dtype=torch.float32, device="cpu")
        return [node.with_(weights=(*node.weights, f"{width} zeros"))]
    return [node]


def _column_order(node: Node, weights: Mapping[str, PackedWeight | torch.Tensor]) -> ColumnOrder | None:
    """The order of the columns that a product with one matrix reads."""
    weight = weights.get(node.weights[0]) if len(node.weights) == 1 else None
    return weight.order if isinstance(weight, PackedMatrix) else None


def _reordered(
    node: Node, order: ColumnOrder, weights: Mapping[str, PackedWeight | torch.Tensor], derived: Weights
) -> list[Node]:
    """The product after nodes that bring its input into the order of the matrix's columns."""
    (x,), (name,) = node.inputs, node.weights
    matrix = weights[name]
    assert isinstance(matrix, PackedMatrix)
    derived[f"{name} as stored"] = matrix.as_stored
    run = x.width // (order.groups * order.each)
    parts = [replace(x, name=f"run {i} for {name}", width=order.groups * run) for i in range(order.each)]
    nodes = [
        Node("columns", (x,), (part,), attrs={"groups": order.groups, "begin": i * run, "end": (i + 1) * run})
        for i, part in enumerate(parts)
    ]
    whole = parts[0]
    for i, part in enumerate(parts[1:], 1):
        joined = replace(x, name=f"runs to {i} for {name}", width=whole.width + part.width)
        nodes.append(Node("concat", (whole, part), (joined,)))
        whole = joined
    return [*nodes, node.with_(inputs=(whole,), weights=(f"{name} as stored",))]


def _with_views(node: Node, weights: Mapping[str, PackedWeight | torch.Tensor], derived: Weights) -> Node:
    """The node with views of its matrices and biases instead of their rows."""
    names, biases = list(node.weights), list(node.attrs["biases"])
    for i, part in enumerate(rows_of(node)):
        if part is None:
            continue
        begin, end, _ = part
        matrix, bias = weights.get(names[i]), biases[i]
        if not isinstance(matrix, PackedMatrix):
            raise BackendError(
                f"weight {names[i]!r} must be a packed matrix for the cpu backend, got a {type(matrix).__name__}"
            )
        tiles = matrix.data[begin // TILE_ROWS : -(-end // TILE_ROWS)]
        names[i] = f"{names[i]}[{begin}:{end}]"
        derived[names[i]] = PackedMatrix(matrix.format, end - begin, matrix.cols, tiles)
        if bias is not None:
            biases[i] = f"{bias}[{begin}:{end}]"
            derived[biases[i]] = _vector(weights, bias)[begin:end]
    return node.with_(weights=tuple(names), attrs={**_without_rows(node), "biases": tuple(biases)})


def _whole_products(node: Node) -> list[Node]:
    """One product per matrix, whose results are cut into the node's outputs; for gate_up also the activation."""
    nodes: list[Node] = []
    gated = node.op == "gate_up"
    out = node.outputs[0]
    outputs = tuple(replace(out, name=f"{out.name}.{part}") for part in ("gate", "up")) if gated else node.outputs
    computed: dict[str, Value] = {}
    for name, bias, part, output in zip(node.weights, node.attrs["biases"], rows_of(node), outputs, strict=True):
        if part is None:
            nodes.append(Node("linear", node.inputs, (output,), (name,), {"biases": (bias,)}))
            continue
        if name not in computed:
            computed[name] = Value(f"{name} of {node.inputs[0].name}", part[2], output.selected)
            nodes.append(Node("linear", node.inputs, (computed[name],), (name,), {"biases": (bias,)}))
        span = {"groups": 1, "begin": part[0], "end": part[1]}
        nodes.append(Node("columns", (computed[name],), (output,), attrs=span))
    if gated:
        nodes.append(Node(GATED[node.attrs["activation"]], outputs, node.outputs))
    return nodes


def _without_rows(node: Node) -> dict[str, Any]:
    return {name: value for name, value in node.attrs.items() if name != "rows"}


def _vector(weights: Mapping[str, PackedWeight | torch.Tensor], name: str) -> torch.Tensor:
    vector = weights.get(name)
    if not isinstance(vector, torch.Tensor):
        raise BackendError(f"weight {name!r} must be a vector, got a {type(vector).__name__}")
    return vector.detach()
