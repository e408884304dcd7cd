"""Merges what adapters add to a product into the step that computes the product: its rows are in the CPU's cache then, and gate
and up need no rows of their own.
"""

from __future__ import annotations

from collections.abc import Callable

from ...graph.ir import Node, Value
from ...graph.ops.products import GATED

_ACTIVATIONS = {op: activation for activation, op in GATED.items()}


def with_low_rank_parts(nodes: list[Node], format_of: Callable[[str], str]) -> list[Node]:
    """Merges `lora_up` into products, and then products and their activation into `gate_up`. `lora_down` reads the rows of the
    product in their kind.

    linear(x) -> y; lora_up(h, y) -> z  =>  linear(x, h) -> z, for all matrices of a node; their sites must follow each other.

    Args:
        nodes: split for their formats.
        format_of: weight name -> format name.
    """
    return _gated(_merged(nodes), format_of)


def _merged(nodes: list[Node]) -> list[Node]:
    readers = _readers(nodes)
    merged: list[Node] = []
    dropped: set[Value] = set()  # results of lora_up that a product computes now
    beside: dict[Value, str] = {}  # result of lora_down -> a weight of the product that adds it
    for node in nodes:
        if node.op == "lora_up" and node.outputs[0] in dropped:
            continue
        ups = [reader for value in node.outputs for reader in readers.get(value, ())] if node.op == "linear" else []
        sites = [up.attrs.get("site", -1) for up in ups]
        fits = len(ups) == len(node.outputs) and all(
            up.op == "lora_up" and up.inputs[1] == y and site == sites[0] + i
            for i, (up, y, site) in enumerate(zip(ups, node.outputs, sites, strict=True))
        )
        if ups and fits:
            outputs = tuple(up.outputs[0] for up in ups)
            dropped.update(outputs)
            beside.update((up.inputs[0], node.weights[0]) for up in ups)
            node = node.with_(
                inputs=(node.inputs[0], *(up.inputs[0] for up in ups)), outputs=outputs, attrs={**node.attrs, "site": sites[0]}
            )
        merged.append(node)
    return [n.with_(attrs={**n.attrs, "beside": beside[n.outputs[0]]}) if set(n.outputs) & beside.keys() else n for n in merged]


def _gated(nodes: list[Node], format_of: Callable[[str], str]) -> list[Node]:
    readers = _readers(nodes)
    producers = {value: node for node in nodes for value in node.outputs}
    merged: dict[int, Node] = {}  # by id of the activation
    dropped: set[int] = set()
    for node in nodes:
        if node.op not in _ACTIVATIONS:
            continue
        gate, up = (producers[value] for value in node.inputs)
        products = (gate, up)
        if any(p.op != "linear" or len(p.weights) != 1 or len(p.inputs) != 2 for p in products) or gate is up:
            continue
        alike = gate.inputs[0] == up.inputs[0] and format_of(gate.weights[0]) == format_of(up.weights[0])
        if not alike or up.attrs["site"] != gate.attrs["site"] + 1 or any(len(readers[v]) != 1 for v in node.inputs):
            continue
        dropped.update(map(id, products))
        merged[id(node)] = Node(
            "gate_up", (*gate.inputs, up.inputs[1]), node.outputs, (*gate.weights, *up.weights),
            {
                "biases": (*gate.attrs["biases"], *up.attrs["biases"]), "activation": _ACTIVATIONS[node.op],
                "site": gate.attrs["site"],
            },
        )  # fmt: skip
    return [merged.get(id(node), node) for node in nodes if id(node) not in dropped]


def _readers(nodes: list[Node]) -> dict[Value, list[Node]]:
    readers: dict[Value, list[Node]] = {}
    for node in nodes:
        for value in node.inputs:
            readers.setdefault(value, []).append(node)
    return readers
