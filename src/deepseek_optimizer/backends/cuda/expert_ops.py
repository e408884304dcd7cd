"""The ops of routed experts: launches the kernels of a node on its values, as `ops.py` does."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...graph.ir import Node
from .gates import gate_of
from .kernels import elementwise, experts, linear, routing, rows
from .ops import Op, Run, Values

_ROUTING = ("top_k", "groups", "top_groups", "scoring", "group_score", "normalize", "scale")


def _router(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    a, weights = node.attrs, run.weights
    name, *factors = node.weights
    (bias,) = a.get("biases", (None,))
    scores = torch.empty((len(inputs[0]), a["experts"]), dtype=torch.float32, device=inputs[0].device)
    linear.linear(inputs[0], weights.matrices[name], weights.vector(bias), scores)
    factor = weights.vector(factors[0]) if factors else None
    routing.route(scores, weights.vector(a["bias"]), factor, outputs[0], **{option: a[option] for option in _ROUTING})


def _hash_router(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    a, (name, table) = node.attrs, node.weights
    scores = torch.empty((len(inputs[0]), a["experts"]), dtype=torch.float32, device=inputs[0].device)
    linear.linear(inputs[0], run.weights.matrices[name], None, scores)
    options = {option: a[option] for option in ("top_k", "scoring", "normalize", "scale")}
    routing.route(
        scores, None, None, outputs[0], groups=1, top_groups=1, group_score="max", **options,
        by_table=(run.at.ids, run.weights.vectors[table]),
    )  # fmt: skip


def _gate_up(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    """Groups the step's pairs for `experts_down` as well, which reads the same routes."""
    (x, routes), stack = inputs, run.weights.stacks[node.weights[0]]
    tiles = run.pairs[node.inputs[1]] = experts.group_for(routes, node.attrs["experts"], stack)
    weighed = node.attrs.get("weigh_input", False)
    experts.gate_up(x, routes, tiles, stack, outputs[0], _biases(run, node), gate_of(node.attrs), weighed)


def _down(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    hidden, routes = inputs
    stack = run.weights.stacks[node.weights[0]]
    weighed = node.attrs.get("weigh_input", False)
    experts.down(hidden, routes, run.pairs.pop(node.inputs[1]), stack, outputs[0], _biases(run, node), weighed)


def _send(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    """What is copied to the host; the copy is `HostExperts.send`."""
    x, routes = inputs
    rows.concat(x, routes, outputs[0])


def _biases(run: Run, node: Node) -> torch.Tensor | None:
    (name,) = node.attrs.get("biases", (None,))
    return run.weights.vector(name)


def _sigmoid_gate(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    x, gate = inputs
    elementwise.sigmoid_gate(x, gate, outputs[0])


EXPERT_OPS: Mapping[str, Op] = {
    "experts_down": _down,
    "experts_gate_up": _gate_up,
    "experts_send": _send,
    "hash_router": _hash_router,
    "router": _router,
    "sigmoid_gate": _sigmoid_gate,
}
