"""Latent attention without expanding the cache: kv_b is applied to the queries and to the result.

q_h (K_h c) = (q_h K_h) c and sum_t p_t (V_h c_t) = V_h (sum_t p_t c_t), where K_h and V_h are kv_b's key and value rows of head
h. A decode step thus reads a token's latent once for all heads. Source: DeepSeek-V2 (2024), section 2.1.2.
"""

from __future__ import annotations

from ..ir import Graph, Node
from .edit import rebuilt


def rewrite(graph: Graph) -> tuple[Graph, list[str]]:
    """mla_attention form="expanded"  =>  form="absorbed"."""
    changes: dict[int, Node | None] = {
        i: node.with_(attrs={**node.attrs, "form": "absorbed"})
        for i, node in enumerate(graph.nodes)
        if node.op == "mla_attention" and node.attrs["form"] == "expanded"
    }
    return rebuilt(graph, changes), [f"layer {graph.nodes[i].attrs['layer']}" for i in changes]
