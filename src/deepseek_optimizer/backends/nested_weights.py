"""Qualities of a model whose matrices contain others in fewer bits (`quant/nested.py`): the same weights, read in part.

| quality | reads all bits of |
|---|---|
| exact | every matrix |
| balanced | every matrix for prompts; for text, every matrix but those of the feed-forward networks and experts |
| fast | what needs it: rows of the embedding, which cost nothing, and `min_formats` |

Feed-forward networks are most of a model's bytes and a smaller part of its error, and prompts are limited by arithmetic, not by
bytes: docs/how-to/quantize.md has the KL divergence that this leaves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ..graph.ir import Graph, Node
from ..graph.min_formats import min_formats
from ..quant import NESTED, VIEWS
from ..quant.nested import unread_bytes
from ..quant.packed import PackedMatrix, PackedStack, PackedWeight
from .qualities import Quality

if TYPE_CHECKING:
    import torch


_GATED = ("gate_up", "experts_gate_up", "experts_down")
_ACTIVATIONS = ("swiglu", "clamped_swiglu", "geglu", "gelu", "gelu_erf", "relu")


def has_qualities(weights: Mapping[str, PackedWeight | torch.Tensor]) -> bool:
    """Whether a model with these weights has other qualities than "exact"."""
    return any(_nested(weight) is not None for weight in weights.values())


def at_quality(
    quality: Quality, graph: Graph, weights: Mapping[str, PackedWeight | torch.Tensor]
) -> tuple[Graph, Mapping[str, PackedWeight | torch.Tensor]]:
    """A graph and weights to compile, which read what text of this quality does. Matrices read in part share their memory.

    Args:
        quality: the quality.
        graph: the model's graph.
        weights: the model's weights by name.
    """
    if quality == "exact":
        return graph, weights
    among = feed_forward_weights(graph) if quality == "balanced" else graph.weights()
    kept = min_formats(graph)
    nested = {name: weight for name in among if name not in kept and (weight := _nested(weights.get(name))) is not None}
    parts = {name: f"{name} at {NESTED[weight.format]}" for name, weight in nested.items()}
    read = {parts[name]: replace(weight, format=NESTED[weight.format]) for name, weight in nested.items()}
    nodes = [
        node if node.op == "embedding" else node.with_(weights=tuple(parts.get(name, name) for name in node.weights))
        for node in graph.nodes
    ]
    return replace(graph, nodes=nodes), {**weights, **read}


def bytes_read(quality: Quality, graph: Graph, weights: Mapping[str, PackedWeight | torch.Tensor]) -> int:
    """Bytes that products read of all matrices at a quality, each once; of a model with experts, those of all experts."""
    graph, weights = at_quality(quality, graph, weights)
    names = {name for node in graph.nodes if node.op != "embedding" for name in node.weights}
    packed = [w for name, w in weights.items() if name in names and isinstance(w, PackedMatrix | PackedStack)]
    return sum(w.nbytes - (unread_bytes(w.data) if w.format in VIEWS else 0) for w in packed)


def feed_forward_weights(graph: Graph) -> set[str]:
    """Names of the matrices before and after activations, and of experts."""
    before = {value for node in graph.nodes if node.op in _ACTIVATIONS for value in node.inputs}
    before |= {value for node in graph.nodes if node.op == "lora_up" and node.outputs[0] in before for value in node.inputs}
    after = {value for node in graph.nodes if node.op in (*_ACTIVATIONS, *_GATED) for value in node.outputs}

    def names(node: Node) -> tuple[str, ...]:
        if node.op in _GATED or (node.op == "linear" and node.inputs[0] in after):
            return node.weights
        if node.op != "linear":
            return ()
        return tuple(name for name, value in zip(node.weights, node.outputs, strict=True) if value in before)

    return {name for node in graph.nodes for name in names(node)}


def _nested(weight: PackedWeight | torch.Tensor | None) -> PackedWeight | None:
    return weight if isinstance(weight, PackedMatrix | PackedStack) and weight.format in NESTED else None
