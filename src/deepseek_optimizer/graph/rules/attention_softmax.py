"""Attention with online softmax: keys are read block by block, and there is no score matrix.

Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Dao et al. 2022, "FlashAttention".
"""

from __future__ import annotations

from ..ir import Graph, Node
from .edit import rebuilt


def rewrite(graph: Graph) -> tuple[Graph, list[str]]:
    """attention softmax="eager"  =>  softmax="online"."""
    changes: dict[int, Node | None] = {
        i: node.with_(attrs={**node.attrs, "softmax": "online"})
        for i, node in enumerate(graph.nodes)
        if node.op == "attention" and node.attrs["softmax"] == "eager"
    }
    return rebuilt(graph, changes), [f"layer {graph.nodes[i].attrs['layer']}" for i in changes]
