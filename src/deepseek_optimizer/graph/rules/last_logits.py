"""Computes the head only for rows whose logits are requested: they are selected before the final norm.

The norm of all rows remains for `hidden_out`, whose last state is normalized; steps that request none skip it.
"""

from __future__ import annotations

from dataclasses import replace

from ..ir import Graph, Node
from .edit import Links, rebuilt


def rewrite(graph: Graph) -> tuple[Graph, list[str]]:
    """rms_norm(x) -> n; lm_head(n)  =>  rms_norm(x) -> n (if read elsewhere); select_rows(x); rms_norm; lm_head, on R rows."""
    links = Links(graph)
    at, head = next(((i, n) for i, n in enumerate(graph.nodes) if n.op == "lm_head"), (0, None))
    if head is None:
        return graph, []
    logits, normed = head.outputs[0], head.inputs[0]
    norm = graph.nodes[links.producer(normed)]
    if logits.selected or links.readers(logits) or norm.op not in ("rms_norm", "layer_norm"):
        return graph, []
    rows = replace(norm.inputs[0], name=f"{norm.inputs[0].name}.rows", selected=True)
    normed_rows = replace(normed, name=f"{normed.name}.rows", selected=True)
    tail = [
        Node("select_rows", norm.inputs, (rows,)),
        norm.with_(inputs=(rows,), outputs=(normed_rows,)),
        head.with_(inputs=(normed_rows,), outputs=(replace(logits, selected=True),)),
    ]
    unread = links.readers(normed) == [at]
    rest = rebuilt(graph, {at: None, **({links.producer(normed): None} if unread else {})})
    return replace(rest, nodes=[*rest.nodes, *tail]), [logits.name]
