"""What a step has to read and to multiply, so that a measured speed can be held against what the machine can do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..backends.base import BLOCK_TOKENS
from ..errors import ConfigError
from ..graph.ir import LatentSpec, Node
from .work import Work


@dataclass(frozen=True)
class Experts:
    """A layer's routed experts. nbytes: of all of them; each token's router chooses `chosen` of `count`."""

    nbytes: int
    count: int
    chosen: int

    def read(self, tokens: int) -> float:
        """Bytes that so many tokens read together, if their choices are independent and even."""
        return self.nbytes * (1 - (1 - self.chosen / self.count) ** tokens)


@dataclass(frozen=True)
class Reads:
    """What decoding reads, in any engine.

    Attributes:
        weight_bytes: matrices read in a step, whatever its batch; of an embedding only the rows looked up are read: left out.
        kv_bytes: of the cache, a token of context.
        experts: matrices of which a step reads some.
        chosen_bytes: of the cache, a token that is attended to where attention is sparse or has a window: `top_k` at most.
    """

    weight_bytes: int
    kv_bytes: float
    experts: tuple[Experts, ...] = field(default=(), kw_only=True)
    chosen_bytes: float = field(default=0.0, kw_only=True)
    top_k: int = field(default=0, kw_only=True)

    def step_bytes(self, work: Work) -> float:
        """Read in a decode step half way through the output."""
        context = work.depth + work.prompt + work.new / 2
        cache = work.batch * (self.kv_bytes * context + self.chosen_bytes * min(context, self.top_k))
        return self.weight_bytes + cache + sum(layer.read(work.batch) for layer in self.experts)

    def token_bytes(self, work: Work) -> float:
        """Read for each generated token: the weights' share falls with the batch."""
        return self.step_bytes(work) / work.batch


@dataclass(frozen=True)
class Traffic(Reads):
    """Attributes:
    weights: numbers in the matrices that every prompt token is multiplied with.
    head_weights: numbers in the output head, which the last token of a prompt alone needs.
    attention_width: numbers of all query heads of all layers together (where keys and values differ in width: their mean).
    """

    weights: int
    head_weights: int
    attention_width: int

    def prefill_operations(self, work: Work) -> float:
        """Multiplications and additions until the first tokens: matrices, the head once a row, causal attention."""
        tokens = work.prompt
        seen = _pairs(work.depth + tokens, self.top_k) - _pairs(work.depth, self.top_k)
        return work.batch * (2 * self.weights * tokens + 2 * self.head_weights + 4 * self.attention_width * seen)


def _pairs(tokens: int, most: int) -> float:
    """Of queries and keys in a text where a token sees itself and those before it, `most` of them (0: all)."""
    full = min(tokens, most) if most else tokens
    return full * (full + 1) / 2 + (tokens - full) * full


def traffic_of(model: Any) -> Traffic:
    """Of a Transformers model. What an optimised one reads is what its plan says (`plan.describe()`), of another what its
    parameters take."""
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
        described = [row for row in runtime.plan.describe() if row["op"] != "embedding" and "bytes" in row]
        steps = described or [_step(node, held) for node in graph.nodes if node.op in _PRODUCTS]  # the reference tells no bytes
        kv_bytes: float = runtime.backend.block_bytes(runtime.graph, runtime.kv_dtype) / BLOCK_TOKENS
        chosen_bytes, top_k = _chosen(runtime)
    else:
        size = model.dtype.itemsize
        held = {name: size * math.prod(shape) for name, shape in shapes.items()}
        steps = [_step(node, held) for node in graph.nodes if node.op in _PRODUCTS]
        kv_bytes, chosen_bytes, top_k = graph.cache.elements_per_token * size, 0.0, 0  # Transformers masks what was not chosen
    return Traffic(
        weight_bytes=sum(row["bytes"] for row in steps if "experts" not in row),
        kv_bytes=kv_bytes - chosen_bytes,
        chosen_bytes=chosen_bytes,
        top_k=top_k,
        experts=tuple(Experts(row["bytes"], row["experts"], row["top_k"]) for row in steps if "experts" in row),
        weights=sum(_multiplied(node, shapes) for node in graph.nodes if node.op in _PRODUCTS) - head_weights,
        head_weights=head_weights,
        attention_width=sum(_attention_width(node) for node in graph.nodes),
    )


def _chosen(runtime: Any) -> tuple[float, int]:
    """Bytes of a token that attention reads, and how many tokens it reads them of; zeros where it reads all."""
    mode, nodes = runtime.config.attention, runtime.graph.nodes
    top_k = next((node.attrs["top_k"] for node in nodes if node.op == "index_choose"), 0)
    if mode.kind == "sliding":
        top_k = mode.sinks + mode.window
    elif mode.kind == "sparse" and not top_k:
        top_k = mode.budget
    if not top_k:
        return 0.0, 0
    plain = {"summaries": False, **({"index": 0} if isinstance(runtime.graph.cache, LatentSpec) else {})}
    attended = replace(runtime.graph, cache=replace(runtime.graph.cache, **plain))
    return runtime.backend.block_bytes(attended, runtime.kv_dtype) / BLOCK_TOKENS, top_k


def _of_unknown_family(model: Any) -> Traffic:
    """Every linear layer is taken to meet every token."""
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


_PRODUCTS = ("linear", "lm_head", "router", "experts_gate_up", "experts_down", "mla_attention")


def _step(node: Node, held: Mapping[str, int]) -> dict[str, int]:
    """As a plan's `describe` has it. held: bytes of each weight."""
    experts = {name: node.attrs[name] for name in ("experts", "top_k")} if node.op.startswith("experts") else {}
    return {"bytes": sum(held[name] for name in node.weights), **experts}


def _multiplied(node: Node, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Numbers that each token is multiplied with."""
    weights = sum(math.prod(shapes[name]) for name in node.weights)
    return weights * node.attrs["top_k"] // node.attrs["experts"] if node.op.startswith("experts") else weights


def _attention_width(node: Node) -> int:
    """Half of the numbers of a query's heads and of their results."""
    a = node.attrs
    if node.op == "attention":
        return int(a["heads"] * a["head_dim"])
    return int(a["heads"] * (a["nope"] + a["rope"] + a["v_dim"]) // 2) if node.op == "mla_attention" else 0
