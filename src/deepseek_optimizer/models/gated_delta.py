"""Hybrid decoders of Qwen3-Next and its successors: layers of gated attention, and layers of gated delta nets.

Source: Yang et al. 2024, Gated Delta Networks. The weights of all norms are offsets from 1, except those of the delta nets'
outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..errors import ConfigError
from ..graph.ir import CacheSpec, Graph, Node, StateSpec, Value
from .attention import attention
from .blocks import FeedForward, emit, linear, trunk_graph
from .decoder import MAX_HEADS, MAX_KERNEL, MAX_WIDTH, Decoder, read_decoder, read_layer_kinds
from .fields import Fields
from .mrope import with_axes


@dataclass(frozen=True)
class DeltaNet:
    """Sizes of the gated delta nets.

    Attributes:
        k_heads, k_dim: query and key heads, and their elements.
        v_heads, v_dim: value heads, and their elements.
        kernel: size of the convolution over queries, keys and values.
    """

    k_heads: int
    k_dim: int
    v_heads: int
    v_dim: int
    kernel: int

    @property
    def keys(self) -> int:
        """Elements of all keys of a token."""
        return self.k_heads * self.k_dim

    @property
    def values(self) -> int:
        """Elements of all values of a token."""
        return self.v_heads * self.v_dim

    @property
    def states(self) -> tuple[StateSpec, StateSpec]:
        """The states of a layer: of the convolution, and of the delta rule."""
        convolved = 2 * self.keys + self.values
        return StateSpec((self.kernel - 1, convolved)), StateSpec((self.v_heads, self.k_dim, self.v_dim))


# (nodes, sizes, input, name, path) -> queries, keys and values before the convolution; gate of the output; a; b
Project = Callable[[list[Node], DeltaNet, Value, str, str], tuple[Value, Value, Value, Value]]


def build_hybrid(
    fields: Fields,
    family: str,
    project: Project,
    feed_forward: Callable[[Decoder], FeedForward],
    width: str = "intermediate_size",
    axes: tuple[int, int, int] | None = None,
) -> Graph:
    """The unfused graph of a hybrid decoder.

    Args:
        fields: the config.
        family: the `model_type`.
        project: appends the input projections of a delta net.
        feed_forward: creates the builder of the layers' feed-forward networks.
        width: name of the field with the width of dense MLPs.
        axes: default sections of multimodal RoPE with alternating axes; None: there is one position.
    """
    bias = fields.flag("attention_bias")
    d = read_decoder(fields, family, qkv_bias=bias, o_bias=bias, partial=0.25, width=width)
    net, kinds = _read_delta_net(fields), read_layer_kinds(fields, d.layers, "full_attention", "linear_attention")
    if axes is not None:
        d = replace(d, ropes=(with_axes(fields, d.rope, axes, interleaved=True),))
    cache_layers = tuple(kinds[:layer].count("full_attention") for layer in range(d.layers))
    d = replace(d, norm="rms_offset", qk_norm="head", gated=True, cache_layers=cache_layers)
    attend = attention(d)

    def mix(nodes: list[Node], x: Value, table: Value | None, layer: int) -> Value:
        if kinds[layer] == "full_attention":
            return attend(nodes, x, table, layer)
        state = len(net.states) * kinds[:layer].count("linear_attention")
        return _delta_net(nodes, d, net, x, f"l{layer}.net", f"model.layers.{layer}.linear_attn", state, project)

    cache = CacheSpec(kinds.count("full_attention"), d.kv_heads, d.head_dim)
    return trunk_graph(d, cache, mix, feed_forward(d), net.states * kinds.count("linear_attention"))


def _read_delta_net(fields: Fields) -> DeltaNet:
    k_heads, v_heads = (fields.integer(f"linear_num_{kind}_heads", MAX_HEADS) for kind in ("key", "value"))
    k_dim, v_dim = (fields.integer(f"linear_{kind}_head_dim", MAX_WIDTH) for kind in ("key", "value"))
    if v_heads % k_heads:
        raise ConfigError(f"config.linear_num_key_heads: {k_heads} does not divide linear_num_value_heads {v_heads}")
    net = DeltaNet(k_heads, k_dim, v_heads, v_dim, fields.integer("linear_conv_kernel_dim", MAX_KERNEL, low=2))
    if 2 * net.keys + net.values > MAX_WIDTH:
        raise ConfigError(
            f"config.linear_key_head_dim: queries, keys and values have {2 * net.keys + net.values} elements, more than the "
            f"maximum of {MAX_WIDTH}"
        )
    return net


def _delta_net(
    nodes: list[Node], d: Decoder, net: DeltaNet, x: Value, name: str, path: str, state: int, project: Project
) -> Value:
    """Projections, convolution, delta rule, norm of each head, gate, output projection."""
    qkv, z, a, b = project(nodes, net, x, name, path)
    mixed = emit(
        nodes, "short_conv", (qkv,), f"{name}.mixed", qkv.width, f"{path}.conv1d.weight", state=state, kernel=net.kernel,
        activation="silu", bias=None,
    )  # fmt: skip
    out = Value(f"{name}.o", net.values)
    shape = {"heads": net.v_heads, "k_heads": net.k_heads, "k_dim": net.k_dim, "v_dim": net.v_dim, "channels": False}
    weights = (f"{path}.A_log", f"{path}.dt_bias")
    nodes.append(Node("delta_rule", (mixed, a, b), (out,), weights, {"state": state + 1, **shape}))
    normed = emit(
        nodes, "head_norm", (out,), f"{name}.o_norm", out.width, f"{path}.norm.weight", eps=d.eps, heads=net.v_heads,
        head_dim=net.v_dim,
    )  # fmt: skip
    gated = emit(nodes, "swiglu", (z, normed), f"{name}.gated", out.width)
    return linear(nodes, gated, f"{name}.out", d.hidden, f"{path}.out_proj")


def project_separately(nodes: list[Node], net: DeltaNet, x: Value, name: str, path: str) -> tuple[Value, Value, Value, Value]:
    """A `Project` with one matrix for queries, keys and values, and one each for the gate, a and b."""
    widths = {"qkv": 2 * net.keys + net.values, "z": net.values, "a": net.v_heads, "b": net.v_heads}
    qkv, z, a, b = (linear(nodes, x, f"{name}.{p}", width, f"{path}.in_proj_{p}") for p, width in widths.items())
    return qkv, z, a, b


def project_by_head(nodes: list[Node], net: DeltaNet, x: Value, name: str, path: str) -> tuple[Value, Value, Value, Value]:
    """A `Project` with two matrices: per key head, one has query, key, values and gates, the other b and a."""
    shared = net.v_heads // net.k_heads
    qkvz = linear(nodes, x, f"{name}.qkvz", 2 * net.keys + 2 * net.values, f"{path}.in_proj_qkvz")
    ba = linear(nodes, x, f"{name}.ba", 2 * net.v_heads, f"{path}.in_proj_ba")
    sizes = {"q": net.k_dim, "k": net.k_dim, "v": shared * net.v_dim, "z": shared * net.v_dim}
    parts, begin = {}, 0
    for p, size in sizes.items():
        parts[p] = _part(nodes, net, qkvz, f"{name}.{p}", begin, begin + size)
        begin += size
    b, a = (_part(nodes, net, ba, f"{name}.{p}", i * shared, (i + 1) * shared) for i, p in enumerate("ba"))
    qk = emit(nodes, "concat", (parts["q"], parts["k"]), f"{name}.qk", 2 * net.keys)
    qkv = emit(nodes, "concat", (qk, parts["v"]), f"{name}.qkv", 2 * net.keys + net.values)
    return qkv, parts["z"], a, b


def _part(nodes: list[Node], net: DeltaNet, x: Value, name: str, begin: int, end: int) -> Value:
    return emit(nodes, "columns", (x,), name, net.k_heads * (end - begin), groups=net.k_heads, begin=begin, end=end)
