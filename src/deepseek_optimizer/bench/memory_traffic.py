"""Bytes read and operations computed in a step, to compare a measured speed with the machine's limits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..backends.base import BLOCK_TOKENS
from ..errors import ConfigError
from ..graph.attention_mode import spans_of_layers
from ..graph.ir import CacheSpec, LatentSpec, Node, RowsSpec
from .work import Work


@dataclass(frozen=True)
class Experts:
    """The routed experts of a layer. nbytes: of all of them; the router chooses `chosen` of `count` for each token."""

    nbytes: int
    count: int
    chosen: int

    def read(self, tokens: int) -> float:
        """Expected bytes read by this number of tokens together, for independent and uniform routing."""
        return self.nbytes * (1 - (1 - self.chosen / self.count) ** tokens)


@dataclass(frozen=True)
class Reads:
    """Bytes that decoding reads, in any engine.

    Attributes:
        weight_bytes: of the matrices read in each step; embeddings, of which only single rows are read, are not included.
        kv_bytes: of the cache per token of context.
        experts: of which a step reads only some.
        chosen_bytes: of the cache per attended token with sparse or windowed attention.
        top_k: maximum number of attended tokens.
        windows: (bytes per token, tokens) of layers with a window beside layers without one.
        state_bytes: of the recurrent states of a sequence.
    """

    weight_bytes: int
    kv_bytes: float
    experts: tuple[Experts, ...] = field(default=(), kw_only=True)
    chosen_bytes: float = field(default=0.0, kw_only=True)
    top_k: int = field(default=0, kw_only=True)
    windows: tuple[tuple[float, int], ...] = field(default=(), kw_only=True)
    state_bytes: int = field(default=0, kw_only=True)

    def step_bytes(self, work: Work) -> float:
        """Bytes read in a decode step in the middle of the output."""
        context = work.depth + work.prompt + work.new / 2
        limited = ((self.chosen_bytes, self.top_k), *self.windows)
        cache = self.kv_bytes * context + sum(size * min(context, tokens) for size, tokens in limited)
        return (
            self.weight_bytes + work.batch * (cache + self.state_bytes) + sum(layer.read(work.batch) for layer in self.experts)
        )

    def token_bytes(self, work: Work) -> float:
        """Bytes read per generated token; the weights are shared by the batch."""
        return self.step_bytes(work) / work.batch


@dataclass(frozen=True)
class Traffic(Reads):
    """Attributes:
    weights: number of weights that every prompt token is multiplied with.
    head_weights: number of weights of the output head, needed only for the last token of a prompt.
    attention_width: total width of the query heads of all layers (if keys and values differ in width: their mean).
    """

    weights: int
    head_weights: int
    attention_width: int

    def prefill_operations(self, work: Work) -> float:
        """Multiplications and additions up to the first tokens: matrices, the head once per row, causal attention."""
        tokens = work.prompt
        pairs = _pairs(work.depth + tokens, self.top_k) - _pairs(work.depth, self.top_k)
        return work.batch * (2 * self.weights * tokens + 2 * self.head_weights + 4 * self.attention_width * pairs)


def _pairs(tokens: int, max_keys: int) -> float:
    """Number of query-key pairs if each token attends to itself and earlier ones, at most `max_keys` (0: all)."""
    full = min(tokens, max_keys) if max_keys else tokens
    return full * (full + 1) / 2 + (tokens - full) * full


def traffic_of(model: Any) -> Traffic:
    """The traffic of a Transformers model: of an optimized one from its plan (`plan.describe()`), of another from its
    parameters."""
    from ..graph.analysis import weight_shapes
    from ..integration.bind.swap import weights_of
    from ..models import build_graph

    try:
        graph = build_graph(model.config)
    except ConfigError:
        return _of_unknown_family(model)
    shapes = weight_shapes(graph)
    head_weights = next(math.prod(shapes[n.weights[0]]) for n in graph.nodes if n.op == "lm_head")
    if "dso" in model.__dict__:
        runtime = model.dso
        held = {name: weight.nbytes for name, weight in weights_of(model, graph).items()}
        described = [row for row in runtime.plan.describe() if row["op"] not in _ROWS and "bytes" in row]
        steps = described or [_step(node, held) for node in graph.nodes if node.op in _PRODUCTS]  # the reference tells no bytes
        chosen_bytes, top_k = _chosen(runtime)
        if isinstance(runtime.graph.cache, RowsSpec):
            kv_bytes, windows = _rows_read(runtime)
        else:
            windows = () if top_k else _windows(runtime)
            kv_bytes = _token_bytes(runtime, runtime.graph) - sum(size for size, _ in windows)
        state_bytes = runtime.backend.state_bytes(runtime.graph)
    else:
        size = model.dtype.itemsize
        held = {name: size * math.prod(shape) for name, shape in shapes.items()}
        steps = [_step(node, held) for node in graph.nodes if node.op in _PRODUCTS]
        kv_bytes = graph.cache.elements_per_token * size
        chosen_bytes, top_k, windows = 0.0, 0, ()  # Transformers masks what was not chosen
        state_bytes = 4 * sum(state.elements for state in graph.states)
    return Traffic(
        weight_bytes=sum(row["bytes"] for row in steps if "experts" not in row),
        kv_bytes=kv_bytes - chosen_bytes,
        chosen_bytes=chosen_bytes,
        top_k=top_k,
        windows=windows,
        state_bytes=state_bytes,
        experts=tuple(Experts(row["bytes"], row["experts"], row["top_k"]) for row in steps if "experts" in row),
        weights=sum(_multiplied(node, shapes) for node in graph.nodes if node.op in _PRODUCTS) - head_weights,
        head_weights=head_weights,
        attention_width=sum(_attention_width(node) for node in graph.nodes),
    )


def matrix_memory(model: Any) -> list[tuple[int, int]]:
    """(address, bytes) of each packed matrix that a decode step of an optimized model reads; [] for another model."""
    from ..backends.cpu.buffers import address
    from ..integration.bind.swap import matrices_of

    if "dso" not in model.__dict__:
        return []
    graph = model.dso.graph
    multiplied = {name for node in graph.nodes if node.op not in _ROWS for name in node.weights}
    held = {name: matrix.data for name, matrix in matrices_of(model, graph).items() if name in multiplied}
    return [(address(data, name, data.dtype, tuple(data.shape)), data.nbytes) for name, data in held.items() if data.is_cpu]


def _chosen(runtime: Any) -> tuple[float, int]:
    """(bytes per attended token, maximum number of attended tokens); zeros if attention reads all tokens."""
    mode, nodes = runtime.config.attention, runtime.graph.nodes
    top_k = next((node.attrs["top_k"] for node in nodes if node.op == "index_choose"), 0)
    if mode.kind == "sliding":
        top_k = mode.sinks + mode.window
    elif mode.kind == "sparse" and not top_k:
        top_k = mode.budget
    if not top_k or isinstance(runtime.graph.cache, RowsSpec):
        return 0.0, 0
    plain = {"summaries": False, **({"index": 0} if isinstance(runtime.graph.cache, LatentSpec) else {})}
    attended = replace(runtime.graph, cache=replace(runtime.graph.cache, **plain))
    return _token_bytes(runtime, attended), top_k


def _windows(runtime: Any) -> tuple[tuple[float, int], ...]:
    """(bytes per token, window) of the layers with each window; () if the cache has no groups of layers."""
    cache = runtime.graph.cache
    if not isinstance(cache, CacheSpec) or not cache.layer_groups:
        return ()
    layers: dict[int, list[int]] = {}
    for layer, span in spans_of_layers(runtime.graph).items():
        if span is not None:
            layers.setdefault(sum(span), []).append(layer)
    return tuple((_bytes_of_layers(runtime, some), tokens) for tokens, some in layers.items())


def _rows_read(runtime: Any) -> tuple[float, tuple[tuple[float, int], ...]]:
    """For compressed attention: the bytes per token of what is read of the whole text, and (bytes per token, tokens) of what is
    read of the last tokens, or of as many as were chosen. Rows that a new entry is computed from are not counted."""
    graph = runtime.graph

    def row_bytes(kind: int) -> float:
        rows = replace(graph.cache.rows[kind], window=0)
        return float(runtime.backend.block_bytes(replace(graph, cache=RowsSpec((rows,))), runtime.kv_dtype)) / rows.places

    whole, limited = 0.0, []
    for node in graph.nodes:
        every = node.attrs.get("every", 1)
        if node.op == "entries_choose":
            whole += row_bytes(node.attrs["layer"]) / every
        elif node.op == "compressed_attention":
            limited.append((row_bytes(node.attrs["layer"]), node.attrs["window"]))
            if node.attrs["entries"] < 0:
                continue
            entry = row_bytes(node.attrs["entries"]) / every
            if len(node.inputs) > 1:
                limited.append((entry, every * graph.producer(node.inputs[1]).attrs["top_k"]))
            else:
                whole += entry
    return whole, tuple(limited)


def _bytes_of_layers(runtime: Any, layers: Sequence[int]) -> float:
    """Bytes of a token in these layers of the cache."""
    kv_heads, head_dim = zip(*map(runtime.graph.cache.heads_of, layers), strict=True)
    some = replace(runtime.graph, cache=CacheSpec(len(layers), kv_heads, head_dim))
    return float(runtime.backend.block_bytes(some, runtime.kv_dtype)) / BLOCK_TOKENS


def _token_bytes(runtime: Any, graph: Any) -> float:
    """Bytes of a token in all layers of the cache."""
    if isinstance(graph.cache, CacheSpec) and graph.cache.layer_groups:  # the blocks of some groups are not full
        return _bytes_of_layers(runtime, range(graph.cache.layers))
    return graph.cache.own_groups * runtime.backend.block_bytes(graph, runtime.kv_dtype) / BLOCK_TOKENS


def _of_unknown_family(model: Any) -> Traffic:
    """Assumes that every linear layer processes every token."""
    from torch import nn

    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return Traffic(
        weight_bytes=sum(m.weight.numel() * m.weight.element_size() for m in linears),
        kv_bytes=2 * config.num_hidden_layers * kv_heads * head_dim * model.dtype.itemsize,
        weights=sum(m.in_features * m.out_features for m in linears) - head.in_features * head.out_features,
        head_weights=head.in_features * head.out_features,
        attention_width=config.num_hidden_layers * config.num_attention_heads * head_dim,
    )


_ROWS = ("embedding", "lookup")  # ops that read single rows of their matrices
_PRODUCTS = (
    "linear", "grouped_linear", "lm_head", "router", "hash_router", "experts_gate_up", "experts_down", "mla_attention",
)  # fmt: skip


def _step(node: Node, held: Mapping[str, int]) -> dict[str, int]:
    """A step in the format of a plan's `describe`. held: bytes of each weight."""
    experts = {name: node.attrs[name] for name in ("experts", "top_k")} if node.op.startswith("experts") else {}
    return {"bytes": sum(held[name] for name in _matrices(node)), **experts}


def _matrices(node: Node) -> tuple[str, ...]:
    return node.weights[:1] if node.op == "hash_router" else node.weights  # without its table


def _multiplied(node: Node, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Number of weights that each token is multiplied with."""
    weights = sum(math.prod(shapes[name]) for name in _matrices(node))
    return weights * node.attrs["top_k"] // node.attrs["experts"] if node.op.startswith("experts") else weights


def _attention_width(node: Node) -> int:
    """Half the total width of the query heads and of their results."""
    a = node.attrs
    if node.op in ("attention", "compressed_attention"):
        return int(a["heads"] * a["head_dim"])
    return int(a["heads"] * (a["nope"] + a["rope"] + a["v_dim"]) // 2) if node.op == "mla_attention" else 0
