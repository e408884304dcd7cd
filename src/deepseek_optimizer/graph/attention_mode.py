"""Modes of attention: which of the tokens before it a token sees. Not a fusion rule: results change where something is hidden.

"flash" sees all. "sliding": a window of the latest tokens, and sinks, the first few, which every model leans on (Xiao et al.
2023, StreamingLLM). "sparse": whole blocks, those of the sinks, those of a window, and those that the query itself estimates
highest (Tang et al. 2024, Quest). Both cost the same a token however long the text is, but for the estimate, a number a block
and head. A layer whose model gave it a window keeps it, where it is the smaller one. A model with a lightning indexer is sparse
as it was trained to be.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ..errors import ConfigError
from .ir import BLOCK, Graph, LatentSpec, Node, Value
from .ops import spec_of


@dataclass(frozen=True)
class AttentionMode:
    """
    Attributes:
        window: latest tokens that are always seen.
        sinks: first tokens that are always seen; sparse attention sees the whole blocks that hold them.
        budget: tokens that a query sees at most in sparse attention, in whole blocks, window and sinks among them.
    """

    kind: Literal["flash", "sliding", "sparse"] = "flash"
    window: int = 0
    sinks: int = 0
    budget: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError where the budget leaves nothing to choose."""
        least = (-(-self.sinks // BLOCK) + -(-self.window // BLOCK) + 2) * BLOCK
        if self.kind == "sparse" and self.budget < least:
            raise ConfigError(
                f"attention_budget: {self.budget} tokens leave nothing to choose beside a window of {self.window} and "
                f"{self.sinks} sinks; {least} is the least, or take a smaller attention_window"
            )

    @property
    def blocks(self) -> int:
        """Blocks that a query sees at most in sparse attention."""
        return self.budget // BLOCK


FLASH = AttentionMode()


def apply_mode(graph: Graph, mode: AttentionMode) -> tuple[Graph, list[str]]:
    """The graph with its attention in this mode, and the layers that changed. For graphs whose rules have been applied.

    An indexer that nobody asks any more goes, and so does its part of the cache.
    """
    if mode.kind == "flash":
        return graph, []
    nodes: list[Node] = []
    places = []
    for node in graph.nodes:
        made = _changed(node, mode)
        if made != [node]:
            places.append(f"layer {node.attrs['layer']}")
        nodes += made
    if mode.kind == "sparse":
        chooses = any(n.op in ("block_choose", "latent_choose") for n in nodes)
        return replace(graph, nodes=nodes, cache=replace(graph.cache, summaries=chooses)), places
    cache = graph.cache
    if isinstance(cache, LatentSpec):
        nodes, cache = _without_indexer(nodes), replace(cache, index=0)
    return replace(graph, nodes=nodes, cache=cache), places


def forgetting(graph: Graph) -> tuple[int, int] | None:
    """(window, sinks): what a sequence holds between its first `sinks` tokens and the last `window` is seen by no later token,
    in no layer. None where some layer may see it all."""
    found = [_span(n) for n in graph.nodes if n.op in ("attention", "mla_attention")]
    spans = [span for span in found if span is not None]
    if not spans or len(spans) < len(found):
        return None
    return max(window for window, _ in spans), max(sinks for _, sinks in spans)


def _span(node: Node) -> tuple[int, int] | None:
    """The window of one attention and its sinks."""
    window = node.attrs.get("window", 0)
    return (window, node.attrs.get("sinks", 0)) if window else None


def _changed(node: Node, mode: AttentionMode) -> list[Node]:
    if node.op == "attention":
        return _windowed(node, mode) if mode.kind == "sliding" else _block_sparse(node, mode)
    if node.op == "mla_attention":
        return _latent_windowed(node, mode) if mode.kind == "sliding" else _latent_sparse(node, mode)
    return [node]


def _windowed(node: Node, mode: AttentionMode) -> list[Node]:
    window = node.attrs["window"]
    if window and window <= mode.window:
        return [node]
    return [node.with_(attrs={**node.attrs, "window": mode.window, "sinks": mode.sinks, "softmax": "online"})]


def _block_sparse(node: Node, mode: AttentionMode) -> list[Node]:
    a, (q,), (out,) = node.attrs, node.inputs, node.outputs
    if a["window"]:
        return [node]
    chosen = Value(f"{out.name}.chosen", a["kv_heads"] * mode.blocks)
    shape = {name: a[name] for name in ("layer", "heads", "kv_heads", "head_dim")}
    return [
        Node("block_choose", (q,), (chosen,), attrs={**shape, **_choice(mode)}),
        node.with_(inputs=(q, chosen), attrs={**a, "softmax": "online"}),
    ]


def _latent_windowed(node: Node, mode: AttentionMode) -> list[Node]:
    """Also where a trained indexer chose what is seen."""
    return [node.with_(inputs=node.inputs[:1], attrs={**node.attrs, "window": mode.window, "sinks": mode.sinks})]


def _latent_sparse(node: Node, mode: AttentionMode) -> list[Node]:
    if len(node.inputs) > 1:  # chosen by a trained indexer
        return [node]
    a, (q,), (out,) = node.attrs, node.inputs, node.outputs
    chosen = Value(f"{out.name}.chosen", BLOCK * mode.blocks)
    shape = {name: a[name] for name in ("layer", "heads", "nope", "rope", "rank", "v_dim")}
    return [
        Node("latent_choose", (q,), (chosen,), node.weights, {**shape, **_choice(mode)}),
        node.with_(inputs=(q, chosen), attrs={**a, "form": "absorbed"}),
    ]


def _choice(mode: AttentionMode) -> dict[str, int]:
    return {"blocks": mode.blocks, "sinks": mode.sinks, "window": mode.window}


def _without_indexer(nodes: list[Node]) -> list[Node]:
    """Without what made an indexer's keys and choices, which nobody reads any more."""
    kept: list[Node] = []
    read: set[Value] = set()
    for node in reversed(nodes):
        spec = spec_of(node)
        kept_always = spec.returns is not None or spec.writes not in (None, "index keys")
        if kept_always or read.intersection(node.outputs):
            kept.append(_narrowed(node, read) if node.op == "linear" else node)
            read.update(node.inputs)
    return kept[::-1]


def _narrowed(node: Node, read: set[Value]) -> Node:
    """A product without the matrices whose results nobody reads."""
    used = [i for i, value in enumerate(node.outputs) if value in read]
    outputs, weights, biases = (tuple(values[i] for i in used) for values in (node.outputs, node.weights, node.attrs["biases"]))
    return node.with_(outputs=outputs, weights=weights, attrs={**node.attrs, "biases": biases})
