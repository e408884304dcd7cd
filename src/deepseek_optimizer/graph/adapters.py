"""Low-rank adapters in a graph: nodes that add an adapter's part to the products that it may change.

The product itself runs over all rows with the model's weights. It is `linear` for most modules; an activation that a rule would
merge into it needs the adapted result first, so these rules are left out (`UNFUSED`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .ir import AdapterSite, Graph, LatentHeads, Node
from .ops.products import rows_of

UNFUSED = ("gate_up",)  # rules that merge something into products


def with_adapters(graph: Graph, rank: int) -> Graph:
    """The graph with `lora_down` and `lora_up` nodes for every product over token rows, sites of absorbed latent attention, and
    `adapter_sites`.

    Args:
        graph: after rules, without those in `UNFUSED`, and attention modes.
        rank: largest rank of an adapter.
    """
    sites: list[AdapterSite] = []
    nodes: list[Node] = []
    latent: dict[str, int] = {}  # kv_b -> its first site: a choice and its attention have the same
    for products in _of_one_input(graph.nodes):
        first = products[0]
        if first.op == "linear" and not first.inputs[0].selected:
            nodes += _adapted(products, rank, sites)
        elif first.op == "latent_choose" or (first.op == "mla_attention" and first.attrs["form"] == "absorbed"):
            (kv_b,) = first.weights
            if kv_b not in latent:
                latent[kv_b] = len(sites)
                sites += _latent_sites(first)
            nodes.append(first.with_(attrs={**first.attrs, "site": latent[kv_b], "lora_rank": rank}))
        else:
            nodes += products
    return replace(graph, nodes=nodes, adapter_sites=tuple(sites))


def _latent_sites(node: Node) -> list[AdapterSite]:
    """Keys and values of latent attention."""
    a, module = node.attrs, node.weights[0].removesuffix(".weight")
    keys, values = (LatentHeads(a["heads"], a["nope"], a["v_dim"], keys) for keys in (True, False))
    return [
        AdapterSite(module, a["nope"], a["rank"], latent=keys),
        AdapterSite(module, a["rank"], a["v_dim"], latent=values),
    ]


def _of_one_input(nodes: list[Node]) -> Iterator[list[Node]]:
    """The nodes in order: neighboring products of one input together, others one by one."""
    group: list[Node] = []
    for node in nodes:
        if group and (node.op != "linear" or group[0].op != "linear" or node.inputs != group[0].inputs):
            yield group
            group = []
        group.append(node)
    if group:
        yield group


def _adapted(products: list[Node], rank: int, sites: list[AdapterSite]) -> list[Node]:
    """The products between the two parts of their adapters: `lora_down` does not depend on them, and can run beside them."""
    downs, bases, ups = [], [], []
    for node in products:
        x, outputs = node.inputs[0], []
        for weight, part, y in zip(node.weights, rows_of(node), node.outputs, strict=True):
            attrs = {"site": len(sites), "rank": rank}
            sites.append(AdapterSite(weight.removesuffix(".weight"), x.width, y.width, part))
            base, h = replace(y, name=f"{y.name}.base"), replace(y, name=f"{y.name}.lora", width=rank)
            downs.append(Node("lora_down", (x,), (h,), attrs=attrs))
            ups.append(Node("lora_up", (h, base), (y,), attrs=attrs))
            outputs.append(base)
        bases.append(node.with_(outputs=tuple(outputs)))
    return [*downs, *bases, *ups]
