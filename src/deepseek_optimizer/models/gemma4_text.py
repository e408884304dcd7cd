"""Gemma 4, text: full layers have wider heads than sliding ones and a RoPE of their own. Only some checkpoints have:

- Embeddings per layer: a second table has a slice for each layer, which is added to a projection of the token's embedding, and
  gated into the layer's result.
- The last layers have no keys and values; they read those of the last earlier layer of their type.
- Values that are the keys before norm and RoPE.
- Experts beside the dense MLP, each branch with norms of its own.

Source: Transformers' modeling_gemma4.py.
"""

from __future__ import annotations

from dataclasses import replace

from ..errors import ConfigError, UnsupportedModelError, shown
from ..graph.ir import CacheSpec, Graph, Node, Value
from .attention import attention
from .blocks import FeedForward, LayerEnd, add, emit, linear, mlp, rms_norm, trunk_graph
from .decoder import (
    FULL,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_VOCAB,
    MAX_WIDTH,
    SLIDING,
    Decoder,
    MlpForm,
    read_decoder,
    read_layer_types,
    windows_of,
)
from .experts import Routing, experts, read_plain_routing
from .fields import Fields
from .gemma import SANDWICH_NORMS, rounded_scale, softcap
from .per_layer_config import layer_fields
from .rope import read_rope

_ROPES = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


def build(fields: Fields) -> Graph:
    return build_text(fields, "gemma4_text", layer_inputs=True, moe=True)


def build_text(fields: Fields, family: str, *, layer_inputs: bool, moe: bool) -> Graph:
    """The graph of a Gemma 4 language model.

    Args:
        fields: the config.
        family: the `model_type`.
        layer_inputs: whether the family may have embeddings per layer.
        moe: whether the family may have experts.
    """
    fields.only("use_bidirectional_attention", None, "vision")  # "vision" concerns tokens of images only
    d, shared = _read(fields, family)
    routing = _read_routing(fields, d.hidden) if moe and fields.flag("enable_moe_block") else None
    width = fields.integer("hidden_size_per_layer_input", MAX_WIDTH, low=0, default=0) if layer_inputs else 0
    rows = fields.integer("vocab_size_per_layer_input", MAX_VOCAB, low=d.vocab) if width else 0
    if width * d.layers > MAX_WIDTH:
        raise ConfigError(
            f"config.hidden_size_per_layer_input: {d.layers} layers of {width} elements exceed the maximum width of {MAX_WIDTH}"
        )
    norms = SANDWICH_NORMS if routing is None else replace(SANDWICH_NORMS, mlp_in="")
    widths = [d.intermediate] * d.layers
    if fields.flag("use_double_wide_mlp"):
        widths[d.layers - shared :] = [2 * d.intermediate] * shared

    def begin(nodes: list[Node], embedded: Value) -> LayerEnd:
        scale = rounded_scale(width**0.5, fields.get("dtype"))
        inputs = _layer_inputs(nodes, d, embedded, width, rows, scale) if width else None
        return lambda nodes, x, layer: _layer_end(nodes, d, x, inputs, width, layer)

    own = d.cache_heads[: d.layers - shared]
    cache = CacheSpec(len(own), tuple(kv_heads for kv_heads, _ in own), tuple(head_dim for _, head_dim in own))
    return trunk_graph(replace(d, layer_norms=norms), cache, attention(d), _feed_forward(d, widths, routing), begin=begin)


def _read(fields: Fields, family: str) -> tuple[Decoder, int]:
    """The model's sizes, and how many of its last layers read the cache of others."""
    layers = fields.integer("num_hidden_layers", MAX_LAYERS)
    kinds = read_layer_types(fields, layers, lambda layer: (layer + 1) % 6 != 0)
    kinds = (*kinds[:-1], FULL)  # as Transformers' config class does
    by_layer = layer_fields(fields, kinds)
    heads = tuple((f.integer("num_key_value_heads", MAX_HEADS), f.integer("head_dim", MAX_WIDTH)) for f in by_layer)
    bias = fields.flag("attention_bias")
    d = read_decoder(
        by_layer[0], family, qkv_bias=bias, o_bias=bias, mlp=MlpForm(activation="gelu"), activation="hidden_activation",
        ropes=lambda _, positions: (),
    )  # fmt: skip
    for layer, (kv_heads, head_dim) in enumerate(heads):
        if d.heads % kv_heads:
            raise ConfigError(f"config.num_global_key_value_heads: {kv_heads} does not divide num_attention_heads {d.heads}")
        if d.heads * head_dim > MAX_WIDTH or heads[layer] != heads[kinds.index(kinds[layer])]:
            raise UnsupportedModelError(
                f"config.per_layer_config: layer {layer} has {kv_heads} key heads of {head_dim} elements; layers of one type "
                f"must have the same, at most {MAX_WIDTH} elements in all heads"
            )
    shared = fields.integer("num_kv_shared_layers", MAX_LAYERS, low=0, default=0)
    own = layers - shared
    sources = {kind: layer for layer, kind in enumerate(kinds[: max(0, own)])}  # the last of each type
    if sources.keys() != set(kinds):
        raise ConfigError(
            f"config.num_kv_shared_layers: the first {own} of {layers} layers must contain each layer type, since the others "
            "read their keys and values"
        )
    ropes = fields if fields.get("rope_parameters") is not None else fields.with_(rope_parameters=_ROPES)
    dims = {kind: head_dim for kind, (_, head_dim) in zip(kinds, heads, strict=True)}
    used = [kind for kind in (FULL, SLIDING) if kind in kinds]
    parameters = ropes.get("rope_parameters")
    if not isinstance(parameters, dict) or not all(isinstance(parameters.get(kind), dict) for kind in used):
        raise ConfigError(f"config.rope_parameters: expected an object for each of {', '.join(used)}, got {shown(parameters)}")
    same = fields.flag("attention_k_eq_v")
    decoder = replace(
        d, ropes=tuple(read_rope(ropes, dims[kind], d.max_positions, layer_type=kind, scaled=False) for kind in used),
        layer_ropes=tuple(used.index(kind) for kind in kinds), windows=windows_of(fields, kinds), scale=1.0, qk_norm="head",
        causal=tuple(kind == FULL for kind in kinds) if fields.get("use_bidirectional_attention") == "vision" else (),
        v_norm=True, cache_heads=heads, own_kv=tuple(layer < own for layer in range(layers)),
        cache_layers=tuple(layer if layer < own else sources[kind] for layer, kind in enumerate(kinds)),
        key_is_value=tuple(same and kind == FULL for kind in kinds),
        embedding_scale=rounded_scale(d.hidden**0.5, fields.get("dtype")),
        logit_softcap=softcap(fields, "final_logit_softcapping"),
    )  # fmt: skip
    return decoder, shared


def _read_routing(fields: Fields, hidden: int) -> Routing:
    return read_plain_routing(
        fields, hidden, per_token="top_k_experts", width="moe_intermediate_size", gate="router.proj",
        factors="router.per_expert_scale",
    )  # fmt: skip


def _layer_inputs(nodes: list[Node], d: Decoder, embedded: Value, width: int, rows: int, scale: float) -> Value:
    """[T, layers * width]: for each layer (norm(W embedding / sqrt(hidden)) + table[token]) / sqrt(2)."""
    total = d.layers * width
    table = emit(nodes, "lookup", (), "layer_embed", total, "model.embed_tokens_per_layer.weight", scale=scale, entries=rows)
    projected = linear(nodes, embedded, "layer_proj", total, "model.per_layer_model_projection")
    projected = emit(nodes, "scale", (projected,), "layer_proj_scaled", total, scale=d.hidden**-0.5)
    normed = emit(
        nodes, "head_norm", (projected,), "layer_proj_norm", total, "model.per_layer_projection_norm.weight",
        eps=d.eps, heads=d.layers, head_dim=width,
    )  # fmt: skip
    both = add(nodes, normed, table, "layer_sum")
    return emit(nodes, "scale", (both,), "layer_inputs", total, scale=2.0**-0.5)


def _layer_end(nodes: list[Node], d: Decoder, x: Value, inputs: Value | None, width: int, layer: int) -> Value:
    """x + norm(W_projection (gelu(W_gate x) * the layer's input)), times the layer's scalar."""
    name, path = f"l{layer}", f"model.layers.{layer}"
    if inputs is not None:
        gate = linear(nodes, x, f"{name}.input_gate", width, f"{path}.per_layer_input_gate")
        part = {"groups": 1, "begin": layer * width, "end": (layer + 1) * width}
        own = emit(nodes, "columns", (inputs,), f"{name}.input", width, **part)
        gated = emit(nodes, "geglu", (gate, own), f"{name}.input_h", width)
        projected = linear(nodes, gated, f"{name}.input_proj", d.hidden, f"{path}.per_layer_projection")
        normed = rms_norm(nodes, projected, f"{name}.input_normed", f"{path}.post_per_layer_input_norm", d.eps)
        x = add(nodes, x, normed, f"{name}.input_out")
    return emit(nodes, "scale_by", (x,), f"{name}.scaled", d.hidden, f"{path}.layer_scalar")


def _feed_forward(d: Decoder, widths: list[int], routing: Routing | None) -> FeedForward:
    """A dense MLP; with experts norm(MLP(norm(x))) + norm(experts(norm(x))), routed by another norm of x."""

    def dense(nodes: list[Node], x: Value, layer: int) -> Value:
        return mlp(nodes, d, x, f"l{layer}.mlp", f"model.layers.{layer}.mlp", widths[layer])

    def both(nodes: list[Node], x: Value, layer: int) -> Value:
        assert routing is not None
        name, path = f"l{layer}", f"model.layers.{layer}"

        def normed(value: Value, label: str, which: str) -> Value:
            return rms_norm(nodes, value, f"{name}.{label}", f"{path}.{which}", d.eps)

        mlp_in = normed(x, "mlp_in", "pre_feedforward_layernorm")
        first = normed(dense(nodes, mlp_in, layer), "mlp_first", "post_feedforward_layernorm_1")
        router = emit(nodes, "rms_norm", (x,), f"{name}.router_normed", d.hidden, f"{path}.router.scale", eps=d.eps)
        router = emit(nodes, "scale", (router,), f"{name}.router_in", d.hidden, scale=d.hidden**-0.5)
        routed = normed(x, "experts_in", "pre_feedforward_layernorm_2")
        routed = experts(nodes, d, routing, routed, router, f"{name}.moe", path)
        return add(nodes, first, normed(routed, "mlp_second", "post_feedforward_layernorm_2"), f"{name}.mlp_sum")

    return dense if routing is None else both
