"""Attention modes: which preceding tokens a token attends to. Unlike fusion rules, they change results.

"flash": all of them. "sliding": a window of the last tokens, and the first few ("sinks"), which every model relies on (Xiao et
al. 2023, StreamingLLM). "sparse": whole blocks: those of the sinks, those of a window, and those with the highest estimated
scores (Tang et al. 2024, Quest). The cost per token of the last two does not grow with the text, except for the estimate of one
score per block and head. A layer with a window or chunks in its model's config keeps them if they are smaller. A model with a
lightning indexer uses the indexer in mode "sparse", as it was trained to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ..errors import ConfigError, UnsupportedModelError
from .ir import BLOCK, Graph, LatentSpec, Node, RowsSpec, Value
from .ops import spec_of


@dataclass(frozen=True)
class AttentionMode:
    """An attention mode and its settings.

    Attributes:
        kind: the mode.
        window: number of last tokens that are always visible.
        sinks: number of first tokens that are always visible; in sparse attention the whole blocks that hold them.
        budget: maximum number of visible tokens in sparse attention, in whole blocks, including window and sinks.
    """

    kind: Literal["flash", "sliding", "sparse"] = "flash"
    window: int = 0
    sinks: int = 0
    budget: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError if the budget leaves no block to choose."""
        minimum = (-(-self.sinks // BLOCK) + -(-self.window // BLOCK) + 2) * BLOCK
        if self.kind == "sparse" and self.budget < minimum:
            raise ConfigError(
                f"attention_budget: {self.budget} tokens leave nothing to choose besides a window of {self.window} and "
                f"{self.sinks} sinks; set at least {minimum}, or a smaller attention_window"
            )

    @property
    def blocks(self) -> int:
        """Maximum number of visible blocks in sparse attention."""
        return self.budget // BLOCK


FLASH = AttentionMode()
Span = tuple[int, int] | None  # window and sinks of attention, in tokens; None: all tokens are visible


def apply_mode(graph: Graph, mode: AttentionMode) -> tuple[Graph, list[str]]:
    """Rewrites the graph's attention to a mode. Fusion rules must have been applied before.

    An indexer that is no longer used is removed, together with its part of the cache.

    Returns: the graph, and the layers that changed.
    """
    if mode.kind == "flash":
        return graph, []
    if isinstance(graph.cache, RowsSpec):  # its layers have windows already, and an indexer
        if mode.kind == "sliding":
            raise UnsupportedModelError(
                "attention_optimization 'sliding' is not supported with compressed attention, which already reads a window and "
                "compressed entries; use 'flash' or 'sparse'"
            )
        return graph, []
    nodes: list[Node] = []
    places = []
    for node in graph.nodes:
        replacement = _changed(node, mode)
        if replacement != [node]:
            places.append(f"layer {node.attrs['layer']}")
        nodes += replacement
    if mode.kind == "sparse":
        chooses = any(n.op in ("block_choose", "latent_choose") for n in nodes)
        return replace(graph, nodes=nodes, cache=replace(graph.cache, summaries=chooses)), places
    cache = graph.cache
    if isinstance(cache, LatentSpec):
        nodes, cache = _without_indexer(nodes), replace(cache, index=0)
    return replace(graph, nodes=nodes, cache=cache), places


def forgetting(graph: Graph) -> tuple[int, int] | None:
    """(window, sinks) such that the tokens between a sequence's first `sinks` and last `window` tokens are no longer visible in
    any layer; None if a layer may attend to every token."""
    return span_of_all(list(spans_of_layers(graph).values()))


def spans_of_layers(graph: Graph) -> dict[int, Span]:
    """Window and sinks of each layer of the cache that is attended to, or None for one without a window."""
    found: dict[int, list[Span]] = {}
    for node in graph.nodes:
        if node.op in ("attention", "mla_attention"):
            window = node.attrs.get("window", 0)
            found.setdefault(node.attrs["layer"], []).append((window, node.attrs.get("sinks", 0)) if window else None)
    return {layer: span_of_all(spans) for layer, spans in found.items()}


def span_of_all(layers: list[Span]) -> Span:
    """The widest window and the most sinks of these layers; None if one of them has no window."""
    spans = [span for span in layers if span is not None]
    if not spans or len(spans) < len(layers):
        return None
    return max(window for window, _ in spans), max(sinks for _, sinks in spans)


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
    attrs = {name: value for name, value in node.attrs.items() if name != "chunked"}
    return [node.with_(attrs={**attrs, "window": mode.window, "sinks": mode.sinks, "softmax": "online"})]


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
    """Also replaces the choice of a trained indexer."""
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
    """The nodes without those that compute an indexer's keys and choices, which are no longer read."""
    needed: list[Node] = []
    read: set[Value] = set()
    for node in reversed(nodes):
        spec = spec_of(node)
        has_result = spec.returns is not None or spec.writes not in (None, "index keys")
        if has_result or read.intersection(node.outputs):
            needed.append(_narrowed(node, read) if node.op == "linear" else node)
            read.update(node.inputs)
    return needed[::-1]


def _narrowed(node: Node, read: set[Value]) -> Node:
    """A product without the matrices whose results are not read."""
    used = [i for i, value in enumerate(node.outputs) if value in read]
    outputs, weights, biases = (tuple(values[i] for i in used) for values in (node.outputs, node.weights, node.attrs["biases"]))
    rows = {"rows": tuple(node.attrs["rows"][i] for i in used)} if node.attrs.get("rows") else {}
    return node.with_(outputs=outputs, weights=weights, attrs={**node.attrs, "biases": biases, **rows})
