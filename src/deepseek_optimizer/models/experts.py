"""Mixtures of experts: reads them from a config and builds their graph nodes.

y = sum over the chosen experts of weight * expert(x), plus the shared experts, which are one gated MLP. Source: DeepSeekMoE
(2024); DeepSeek-V3 (2024), section 2.1.2, for the correction bias, which affects the choice of experts but not their weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..graph.ir import Node, Value
from ..graph.ops.experts import StackLayout
from ..graph.ops.products import GATED
from .blocks import FeedForward, add, emit, linear, mlp
from .decoder import MAX_LAYERS, MAX_WIDTH, Trunk
from .fields import Fields

MAX_EXPERTS, MAX_EXPERT_WEIGHTS = 1 << 14, 1 << 40  # per layer


@dataclass(frozen=True, kw_only=True)
class ClampedForm:
    """Experts with a clamped SwiGLU (op `experts_gate_up`).

    Attributes:
        alpha: factor in the gate's sigmoid.
        limit: of gate and up.
        raised: the form of gpt-oss: 1 is added to up, and experts have biases and are stored interleaved. Otherwise shared
            experts are clamped too.
    """

    alpha: float
    limit: float
    raised: bool = True


@dataclass(frozen=True)
class Routing:
    """How a layer chooses experts, see op `router` for the formulas, and the experts' form.

    Attributes:
        experts, top_k: number of experts, and how many are chosen per token.
        groups, top_groups: number of groups of experts, and how many best groups the experts are chosen from.
        scoring, group_score, normalize, scale: as in op `router`.
        bias: name of the correction bias that is added to the scores for the choice; "": none.
        width: intermediate size of an expert.
        shared: intermediate size of all shared experts together; 0: there are none.
        module, gate, shared_module: names of the layer's module, and in it of the router and the shared experts.
        shared_gate: name of the projection to the logit of the shared experts' weight; "": they have the weight 1.
        gate_bias: whether the router's product has a bias.
        clamped: the experts have this form; None: no biases, and the activation of dense MLPs.
        table: in some layers, name of the parameter with the experts of each token id; "": in none.
        by_table: for each layer whether its experts are chosen by `table`; (): in none.
        weigh_input: an expert's weight multiplies its input instead of its output.
        layout: how the experts' matrices are stored, see `quant/transposed_stack.py`; "interleaved" with a raised `clamped`.
        factors: name of the parameter with a factor of each expert's weights; "": none.
    """

    experts: int
    top_k: int
    groups: int
    top_groups: int
    scoring: str
    group_score: str
    normalize: bool
    scale: float
    bias: str
    width: int
    shared: int
    module: str = "mlp"
    gate: str = "gate"
    shared_module: str = "shared_experts"
    shared_gate: str = ""
    gate_bias: bool = False
    clamped: ClampedForm | None = None
    weigh_input: bool = False
    layout: StackLayout = "rows"
    factors: str = ""
    table: str = ""
    by_table: tuple[bool, ...] = ()


def read_softmax_routing(fields: Fields, hidden: int) -> Routing:
    """DeepSeek-V2's routing: softmax over all experts; greedy, or limited to the groups with the highest maximum score."""
    fields.only("scoring_func", None, "softmax")
    fields.only("norm_topk_prob", None, False)  # Transformers' router would ignore it
    fields.only("topk_method", "greedy", "group_limited_greedy")
    limited = fields.get("topk_method") == "group_limited_greedy"
    return _routing(fields, hidden, grouped=limited, scoring="softmax", group_score="max", normalize=False, bias="")


def read_sigmoid_routing(fields: Fields, hidden: int, count: str = "n_routed_experts") -> Routing:
    """DeepSeek-V3's routing: sigmoid scores with a correction bias; a group's score is the sum of its two highest. `count`:
    name of the field with the number of experts."""
    fields.only("scoring_func", None, "sigmoid")
    fields.only("topk_method", None, "noaux_tc")
    normalize = fields.flag("norm_topk_prob")
    bias = "gate.e_score_correction_bias"
    return _routing(fields, hidden, count, grouped=True, scoring="sigmoid", group_score="top2", normalize=normalize, bias=bias)


def read_grouped_softmax_routing(fields: Fields, hidden: int) -> Routing:
    """Mistral 4's routing: softmax over all experts; a group's score is the sum of its two highest."""
    normalize = fields.flag("norm_topk_prob")
    return _routing(fields, hidden, grouped=True, scoring="softmax", group_score="top2", normalize=normalize, bias="")


def read_plain_routing(
    fields: Fields,
    hidden: int,
    *,
    experts: str = "num_experts",
    per_token: str = "num_experts_per_tok",
    width: str,
    **rest: Any,
) -> Routing:
    """Routing without groups, scales or shared experts: the experts with the highest scores.

    Args:
        fields: the config.
        hidden: hidden size.
        experts, per_token, width: names of the fields with the number of experts, how many a token uses, and their
            intermediate size.
        rest: further fields of `Routing`; softmax scores, normalized, without a bias by default.
    """
    count, top_k = fields.integer(experts, MAX_EXPERTS), fields.integer(per_token, MAX_EXPERTS)
    if top_k > count:
        raise ConfigError(f"config.{per_token}: cannot choose {top_k} of {experts} {count}")
    size = fields.integer(width, MAX_WIDTH)
    if 2 * count * size * hidden > MAX_EXPERT_WEIGHTS:
        raise ConfigError(f"config.{experts}: {count} experts of {size} x {hidden} exceed the maximum per layer")
    options: dict[str, Any] = {
        "groups": 1, "top_groups": 1, "scoring": "softmax", "group_score": "max", "normalize": True, "scale": 1.0, "bias": "",
        "shared": 0,
    }  # fmt: skip
    return Routing(experts=count, top_k=top_k, width=size, **{**options, **rest})


def _routing(
    fields: Fields, hidden: int, count: str = "n_routed_experts", *, grouped: bool, group_score: str, **rest: Any
) -> Routing:
    experts = fields.integer(count, MAX_EXPERTS)
    top_k = fields.integer("num_experts_per_tok", MAX_EXPERTS)
    if top_k > experts:
        raise ConfigError(f"config.num_experts_per_tok: cannot choose {top_k} of {count} {experts}")
    groups = fields.integer("n_group", MAX_EXPERTS) if grouped else 1
    if experts % groups:
        raise ConfigError(f"config.n_group: {groups} does not divide {count} {experts}")
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
        raise ConfigError(f"config.{count}: {experts} experts of {width} x {hidden} exceed the maximum per layer")
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


def sparse_by_step(fields: Fields, layers: int) -> tuple[bool, ...]:
    """Whether each layer has experts: every `decoder_sparse_step`-th one that is not in `mlp_only_layers` (Qwen's MoE)."""
    step = fields.integer("decoder_sparse_step", MAX_LAYERS, default=1)
    dense = fields.layers("mlp_only_layers") if fields.get("mlp_only_layers") else ()
    return tuple((layer + 1) % step == 0 and layer not in dense for layer in range(layers))


def feed_forward(d: Trunk, routing: Routing | None, sparse: tuple[bool, ...], dense: str = "mlp") -> FeedForward:
    """Builds a layer's feed-forward network: experts if `sparse` is true for it or it is an MTP layer, else a dense MLP, whose
    module is called `dense`."""

    def forward(nodes: list[Node], x: Value, layer: int) -> Value:
        name, path = f"l{layer}.mlp", f"model.layers.{layer}"
        if routing is None or (layer < d.layers and not sparse[layer]):
            return mlp(nodes, d, x, name, f"{path}.{dense}", d.intermediate)
        by_table = layer < len(routing.by_table) and routing.by_table[layer]
        return experts(nodes, d, routing, x, x, name, f"{path}.{routing.module}", by_table)

    return forward


def experts(
    nodes: list[Node], d: Trunk, r: Routing, x: Value, routed_by: Value, name: str, path: str, by_table: bool = False
) -> Value:
    """Routed and shared experts of `x`, interleaved in such an order that a backend can run both side by side.

    Args:
        x: the experts' input.
        routed_by: the router's input.
        name: of the nodes.
        path: of the module with router and experts.
        by_table: whether experts are chosen by the token's id.
    """
    routes = Value(f"{name}.routes", 2 * r.top_k)
    nodes.append(_table_router(r, routed_by, routes, path) if by_table else _router(r, routed_by, routes, path))
    return _expert_products(nodes, d, r, x, routes, name, path)


def _table_router(r: Routing, routed_by: Value, routes: Value, path: str) -> Node:
    weights = (f"{path}.{r.gate}.weight", f"{path}.{r.table}")
    attrs = {"experts": r.experts, "top_k": r.top_k, "scoring": r.scoring, "normalize": r.normalize, "scale": r.scale}
    return Node("hash_router", (routed_by,), (routes,), weights, attrs)


def _router(r: Routing, routed_by: Value, routes: Value, path: str) -> Node:
    weights = (f"{path}.{r.gate}.weight", *([f"{path}.{r.factors}"] if r.factors else []))
    attrs = dict(
        bias=f"{path}.{r.bias}" if r.bias else None, experts=r.experts, top_k=r.top_k, groups=r.groups,
        top_groups=r.top_groups, scoring=r.scoring, group_score=r.group_score, normalize=r.normalize, scale=r.scale,
        **({"biases": (f"{path}.{r.gate}.bias",)} if r.gate_bias else {}),
    )  # fmt: skip
    return Node("router", (routed_by,), (routes,), weights, attrs)


def _expert_products(nodes: list[Node], d: Trunk, r: Routing, x: Value, routes: Value, name: str, path: str) -> Value:
    gate_up, down_matrix = (f"{path}.experts.{matrix}_proj" for matrix in ("gate_up", "down"))
    which: dict[str, Any] = {"experts": r.experts, "top_k": r.top_k, "grouped": False}
    activation: dict[str, Any] = {"activation": d.mlp.activation} if d.mlp.activation != "silu" else {}
    if r.weigh_input:
        which["weigh_input"] = True
    if r.layout != "rows":
        which["layout"] = r.layout
    if r.clamped is not None:
        activation = {"alpha": r.clamped.alpha, "limit": r.clamped.limit}
        if r.clamped.raised:
            which["layout"] = "interleaved"
            activation["biases"] = (f"{gate_up}_bias",)
        else:
            activation["raised"] = False
    hidden = Value(f"{name}.experts", r.width, repeat=r.top_k)
    nodes.append(Node("experts_gate_up", (x, routes), (hidden,), (gate_up,), {**which, **activation}))
    if r.clamped is not None and r.clamped.raised:
        which["biases"] = (f"{down_matrix}_bias",)
    if not r.shared:
        return emit(nodes, "experts_down", (hidden, routes), f"{name}.out", d.hidden, down_matrix, **which)
    shared_path, bias = f"{path}.{r.shared_module}", d.mlp.bias
    gate, up = (linear(nodes, x, f"{name}.shared_{p}", r.shared, f"{shared_path}.{p}_proj", bias) for p in ("gate", "up"))
    gated, limit = (GATED[d.mlp.activation], {}) if r.clamped is None else ("clamped_swiglu", {"limit": r.clamped.limit})
    shared = emit(nodes, gated, (gate, up), f"{name}.shared_h", r.shared, **limit)
    routed = emit(nodes, "experts_down", (hidden, routes), f"{name}.routed", d.hidden, down_matrix, **which)
    down = linear(nodes, shared, f"{name}.shared_down", d.hidden, f"{shared_path}.down_proj", bias)
    if r.shared_gate:
        logit = linear(nodes, x, f"{name}.shared_logit", 1, f"{path}.{r.shared_gate}")
        down = emit(nodes, "sigmoid_gate", (down, logit), f"{name}.shared_gated", d.hidden)
    return add(nodes, routed, down, f"{name}.out")
