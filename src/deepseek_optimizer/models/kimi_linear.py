"""Kimi Linear: layers of latent attention without RoPE, and layers of delta attention, whose states decay row by row.

Source: Kimi Team 2025, Kimi Linear.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import ConfigError, shown
from ..graph.ir import Graph, Node, StateSpec, Value
from .blocks import emit, linear, trunk_graph
from .decoder import MAX_HEADS, MAX_KERNEL, MAX_WIDTH, read_layer_kinds
from .experts import feed_forward, listed_layers, read_sigmoid_routing
from .fields import Fields
from .mla import LatentDecoder, attention, read_latent_decoder


@dataclass(frozen=True)
class DeltaAttention:
    """Sizes of the delta attention: heads, elements of a query, key or value, and size of the convolution."""

    heads: int
    dim: int
    kernel: int

    @property
    def width(self) -> int:
        """Elements of all queries, keys or values of a token."""
        return self.heads * self.dim


def build(fields: Fields) -> Graph:
    d = read_latent_decoder(fields, "kimi_linear", interleaved=False)
    kinds = _kinds(fields, d.layers)
    full = kinds.count("full_attention")
    # Frequencies of zero: the shared part of a key is cached as it is.
    unrotated = replace(d.rope, inv_freq=np.zeros_like(d.rope.inv_freq), scaling=1.0)
    d = replace(d, ropes=(unrotated,), cache_layers=tuple(kinds[:layer].count("full_attention") for layer in range(d.layers)))
    net, attend = _read_delta_attention(fields), attention(d)

    def mix(nodes: list[Node], x: Value, table: Value | None, layer: int) -> Value:
        if kinds[layer] == "full_attention":
            return attend(nodes, x, table, layer)
        return _delta_attention(nodes, d, net, x, layer, 2 * kinds[:layer].count("linear_attention"))

    sparse = _sparse(fields, d.layers)
    routing = read_sigmoid_routing(fields, d.hidden, "num_local_experts") if any(sparse) else None
    states = (StateSpec((net.kernel - 1, 3 * net.width)), StateSpec((net.heads, net.dim, net.dim)))
    return trunk_graph(d, replace(d.cache, layers=full), mix, feed_forward(d, routing, sparse), states * (d.layers - full))


def _published(fields: Fields) -> dict[str, Any]:
    """The published config's section on linear attention; Transformers' config object has its content in other fields."""
    section = fields.get("linear_attn_config") or {}
    if not isinstance(section, dict):
        raise ConfigError(f"config.linear_attn_config: expected an object, got {shown(section)}")
    return section


def _kinds(fields: Fields, layers: int) -> tuple[str, ...]:
    """Each layer's kind; in the published form from lists of layers, counted from 1."""
    section = _published(fields)
    if fields.get("layer_types") is not None:
        return read_layer_kinds(fields, layers, "full_attention", "linear_attention")
    lists = {
        kind: section.get(name) for kind, name in (("full_attention", "full_attn_layers"), ("linear_attention", "kda_layers"))
    }
    if None in lists.values():
        return tuple("full_attention" if i and i % 4 == 0 else "linear_attention" for i in range(layers))
    kinds = {i: kind for kind, listed in lists.items() if isinstance(listed, list) for i in listed if isinstance(i, int)}
    if sorted(kinds) != list(range(1, layers + 1)):
        raise ConfigError(
            f"config.linear_attn_config: full_attn_layers and kda_layers must name each of {layers} layers, got {shown(lists)}"
        )
    return tuple(kinds[i + 1] for i in range(layers))


def _sparse(fields: Fields, layers: int) -> tuple[bool, ...]:
    if fields.get("mlp_layer_types") is None and fields.get("first_k_dense_replace") is None:
        return tuple(layer >= 1 for layer in range(layers))
    return listed_layers(fields, layers)


def _read_delta_attention(fields: Fields) -> DeltaAttention:
    names = {"linear_num_heads": "num_heads", "linear_head_dim": "head_dim", "linear_conv_kernel_dim": "short_conv_kernel_size"}
    section = _published(fields)
    read = Fields({name: section.get(published, fields.get(name)) for name, published in names.items()})
    net = DeltaAttention(
        read.integer("linear_num_heads", MAX_HEADS), read.integer("linear_head_dim", MAX_WIDTH),
        read.integer("linear_conv_kernel_dim", MAX_KERNEL, low=2),
    )  # fmt: skip
    if 3 * net.width > MAX_WIDTH:
        raise ConfigError(
            f"config.linear_head_dim: queries, keys and values have {3 * net.width} elements, more than the maximum of "
            f"{MAX_WIDTH}"
        )
    return net


def _delta_attention(nodes: list[Node], d: LatentDecoder, net: DeltaAttention, x: Value, layer: int, state: int) -> Value:
    """Projections, convolution, delta rule with a decay per element of a key, norm of each head, gate, output projection."""
    name, path = f"l{layer}.delta", f"model.layers.{layer}.self_attn"
    q, k, v = (linear(nodes, x, f"{name}.{p}", net.width, f"{path}.{p}_proj") for p in "qkv")
    qk = emit(nodes, "concat", (q, k), f"{name}.qk", 2 * net.width)
    qkv = emit(nodes, "concat", (qk, v), f"{name}.qkv", 3 * net.width)
    mixed = emit(
        nodes, "short_conv", (qkv,), f"{name}.mixed", qkv.width, f"{path}.conv1d.weight", state=state, kernel=net.kernel,
        activation="silu", bias=None,
    )  # fmt: skip
    forget = linear(nodes, x, f"{name}.f_a", net.dim, f"{path}.forget_gate.f_a_proj")
    forget = linear(nodes, forget, f"{name}.f_b", net.width, f"{path}.forget_gate.f_b_proj")
    rate = linear(nodes, x, f"{name}.b", net.heads, f"{path}.b_proj")
    out = Value(f"{name}.o", net.width)
    shape = {"heads": net.heads, "k_heads": net.heads, "k_dim": net.dim, "v_dim": net.dim, "channels": True}
    weights = (f"{path}.forget_gate.A_log", f"{path}.forget_gate.dt_bias")
    nodes.append(Node("delta_rule", (mixed, forget, rate), (out,), weights, {"state": state + 1, **shape}))
    normed = emit(
        nodes, "head_norm", (out,), f"{name}.o_norm", out.width, f"{path}.o_norm.weight", eps=d.eps, heads=net.heads,
        head_dim=net.dim,
    )  # fmt: skip
    gate = linear(nodes, x, f"{name}.g_a", net.dim, f"{path}.g_a_proj")
    gate = linear(nodes, gate, f"{name}.g_b", net.width, f"{path}.g_b_proj")
    gated = emit(nodes, "sigmoid_gate", (normed, gate), f"{name}.gated", out.width)
    return linear(nodes, gated, f"{name}.out", d.hidden, f"{path}.o_proj")
