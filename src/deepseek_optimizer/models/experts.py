"""Mixtures of experts: reads them from a config and builds their graph nodes.

y = sum over the chosen experts of weight * expert(x), plus the shared experts, which are one gated MLP. Source: DeepSeekMoE
(2024); DeepSeek-V3 (2024), section 2.1.2, for the correction bias, which affects the choice of experts but not their weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..graph.ir import Node, Value
from .blocks import FeedForward, add, emit, linear, mlp
from .decoder import MAX_LAYERS, MAX_WIDTH, Trunk
from .fields import Fields

MAX_EXPERTS, MAX_EXPERT_WEIGHTS = 1 << 14, 1 << 40  # per layer


@dataclass(frozen=True)
class Routing:
    """How a layer chooses experts; see op `router` for the formulas.

    Attributes:
        experts, top_k: number of experts, and how many are chosen per token.
        groups, top_groups: number of groups of experts, and how many best groups the experts are chosen from.
        scoring, group_score, normalise, scale: as in op `router`.
        bias: whether a correction bias is added to the scores for the choice.
        width: intermediate size of an expert.
        shared: intermediate size of all shared experts together.
    """

    experts: int
    top_k: int
    groups: int
    top_groups: int
    scoring: str
    group_score: str
    normalise: bool
    scale: float
    bias: bool
    width: int
    shared: int


def read_softmax_routing(fields: Fields, hidden: int) -> Routing:
    """DeepSeek-V2's routing: softmax over all experts; greedy, or limited to the groups with the highest maximum score."""
    fields.only("scoring_func", None, "softmax")
    fields.only("norm_topk_prob", None, False)  # Transformers' router would ignore it
    fields.only("topk_method", "greedy", "group_limited_greedy")
    limited = fields.get("topk_method") == "group_limited_greedy"
    return _routing(fields, hidden, grouped=limited, scoring="softmax", group_score="max", normalise=False, bias=False)


def read_sigmoid_routing(fields: Fields, hidden: int) -> Routing:
    """DeepSeek-V3's routing: sigmoid scores with a correction bias; a group's score is the sum of its two highest."""
    fields.only("scoring_func", None, "sigmoid")
    fields.only("topk_method", None, "noaux_tc")
    normalise = fields.flag("norm_topk_prob")
    return _routing(fields, hidden, grouped=True, scoring="sigmoid", group_score="top2", normalise=normalise, bias=True)


def _routing(fields: Fields, hidden: int, *, grouped: bool, group_score: str, **rest: Any) -> Routing:
    experts = fields.integer("n_routed_experts", MAX_EXPERTS)
    top_k = fields.integer("num_experts_per_tok", MAX_EXPERTS)
    if top_k > experts:
        raise ConfigError(f"config.num_experts_per_tok: cannot choose {top_k} of n_routed_experts {experts}")
    groups = fields.integer("n_group", MAX_EXPERTS) if grouped else 1
    if experts % groups:
        raise ConfigError(f"config.n_group: {groups} does not divide n_routed_experts {experts}")
    if group_score == "top2" and experts // groups < 2:
        raise ConfigError(f"config.n_group: {groups} groups have one expert each, but a group's score needs two")
    top_groups = fields.integer("topk_group", MAX_EXPERTS) if grouped else 1
    if top_groups > groups:
        raise ConfigError(f"config.topk_group: cannot choose {top_groups} of n_group {groups}")
    if top_k > top_groups * (experts // groups):
        raise ConfigError(
            f"config.num_experts_per_tok: cannot choose {top_k} from topk_group {top_groups} groups of {experts // groups}"
        )
    width, shared = fields.integer("moe_intermediate_size", MAX_WIDTH), fields.integer("n_shared_experts", MAX_EXPERTS)
    if width * shared > MAX_WIDTH:
        raise ConfigError(f"config.n_shared_experts: {shared} experts of width {width} exceed the maximum width of {MAX_WIDTH}")
    if 2 * experts * width * hidden > MAX_EXPERT_WEIGHTS:
        raise ConfigError(f"config.n_routed_experts: {experts} experts of {width} x {hidden} exceed the maximum per layer")
    scale = fields.positive("routed_scaling_factor")
    return Routing(
        experts=experts, top_k=top_k, groups=groups, top_groups=top_groups, group_score=group_score, scale=scale, width=width,
        shared=width * shared, **rest,
    )  # fmt: skip


def first_dense(fields: Fields, layers: int) -> tuple[bool, ...]:
    """Whether each layer has experts: all except the first `first_k_dense_replace`."""
    dense = fields.integer("first_k_dense_replace", MAX_LAYERS, low=0)
    fields.only("moe_layer_freq", None, 1)
    return tuple(layer >= dense for layer in range(layers))


def listed_layers(fields: Fields, layers: int) -> tuple[bool, ...]:
    """Whether each layer has experts, from `mlp_layer_types`; without that field as in `first_dense`."""
    kinds = fields.get("mlp_layer_types")
    if kinds is None:
        return first_dense(fields, layers)
    if not isinstance(kinds, (list, tuple)) or len(kinds) != layers or any(kind not in ("dense", "sparse") for kind in kinds):
        raise ConfigError(f"config.mlp_layer_types: expected 'dense' or 'sparse' for each of {layers} layers, got {kinds!r}")
    return tuple(kind == "sparse" for kind in kinds)


def feed_forward(d: Trunk, routing: Routing | None, sparse: tuple[bool, ...]) -> FeedForward:
    """Builds a layer's feed-forward network: experts if `sparse` is true for it or it is an MTP layer, else a dense MLP."""

    def forward(nodes: list[Node], x: Value, layer: int) -> Value:
        name, path = f"l{layer}.mlp", f"model.layers.{layer}.mlp"
        if routing is None or (layer < d.layers and not sparse[layer]):
            return mlp(nodes, d, x, name, path, d.intermediate)
        return _experts(nodes, d, routing, x, name, path)

    return forward


def _experts(nodes: list[Node], d: Trunk, r: Routing, x: Value, name: str, path: str) -> Value:
    """Routed and shared experts, interleaved in such an order that a backend can run both side by side."""
    routes = emit(
        nodes, "router", (x,), f"{name}.routes", 2 * r.top_k, f"{path}.gate.weight",
        bias=f"{path}.gate.e_score_correction_bias" if r.bias else None, experts=r.experts, top_k=r.top_k, groups=r.groups,
        top_groups=r.top_groups, scoring=r.scoring, group_score=r.group_score, normalise=r.normalise, scale=r.scale,
    )  # fmt: skip
    which = {"experts": r.experts, "top_k": r.top_k, "grouped": False}
    hidden = Value(f"{name}.experts", r.width, repeat=r.top_k)
    nodes.append(Node("experts_gate_up", (x, routes), (hidden,), (f"{path}.experts.gate_up_proj",), which))
    gate, up = (
        linear(nodes, x, f"{name}.shared_{p}", r.shared, f"{path}.shared_experts.{p}_proj", d.mlp_bias) for p in ("gate", "up")
    )
    shared = emit(nodes, "swiglu", (gate, up), f"{name}.shared_h", r.shared)
    routed = emit(nodes, "experts_down", (hidden, routes), f"{name}.routed", d.hidden, f"{path}.experts.down_proj", **which)
    down = linear(nodes, shared, f"{name}.shared_down", d.hidden, f"{path}.shared_experts.down_proj", d.mlp_bias)
    return add(nodes, routed, down, f"{name}.out")
