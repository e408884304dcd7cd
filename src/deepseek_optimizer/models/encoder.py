"""Encoders as graph nodes: bidirectional attention, and layers with the norms after each residual (BERT).

A graph begins with the output of the model's embeddings module (`state_in`), which Transformers computes, and ends with the
last hidden state. Poolers and heads are modules on top of it. Weights are named by their path in the base model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import ConfigError, UnsupportedModelError, shown
from ..graph.ir import NO_CACHE, Graph, Node, Value
from .blocks import add, emit, linear
from .decoder import MAX_HEADS, MAX_LAYERS, MAX_POSITIONS, MAX_VOCAB, MAX_WIDTH
from .fields import Fields

MAX_HEAD_DIM = 256  # of the attention kernels
# Transformers' name of an activation -> op
ACTIVATIONS = {"gelu": "gelu_erf", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Sizes of an encoder.

    Attributes:
        family: the `model_type`.
        layers, hidden, inner, vocab: number of layers; hidden size; width of the MLPs; vocabulary size.
        heads, kv_heads: number of query heads; of key and value heads, which divide it.
        head_dim: number of elements of a head.
        max_positions: context length in tokens.
        eps: epsilon of the norms.
        activation: op of the MLPs' activation.
    """

    family: str
    layers: int
    hidden: int
    inner: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    eps: float
    activation: str


@dataclass(frozen=True)
class PostNormLayer:
    """Names of the modules in a layer of BERT's form.

    Attributes:
        path: of layer i, with {} for i.
        q, k, v, o: projections of the attention.
        attention_norm, mlp_norm: norms after each residual.
        up, down: projections of the MLP.
    """

    path: str
    q: str
    k: str
    v: str
    o: str
    attention_norm: str
    up: str
    down: str
    mlp_norm: str


def read_encoder(
    fields: Fields,
    family: str,
    *,
    layers: str = "num_hidden_layers",
    hidden: str = "hidden_size",
    inner: str = "intermediate_size",
    heads: str = "num_attention_heads",
    kv_heads: str = "",
    head_dim: str = "",
    eps: str = "layer_norm_eps",
    activation: str = "hidden_act",
    fixed_eps: float | None = None,
    activations: Mapping[str, str] = ACTIVATIONS,
) -> Encoder:
    """Reads and checks the fields that all families share.

    Args:
        fields: the config.
        family: the `model_type`.
        layers, hidden, inner, heads, eps, activation: names of the fields.
        kv_heads: name of the field; "": as many as query heads.
        head_dim: name of a field that may be missing; without it, heads divide the hidden size.
        fixed_eps: the norms' epsilon in families without such a field.
        activations: the op of each activation that the MLPs may have.

    Raises:
        UnsupportedModelError, ConfigError: a field has a value that is not supported, or not valid.
    """
    width, count = fields.integer(hidden, MAX_WIDTH), fields.integer(heads, MAX_HEADS)
    if head_dim and fields.get(head_dim) is not None:
        size = fields.integer(head_dim, MAX_WIDTH)
    elif width % count:
        raise ConfigError(f"config.{heads}: {count} does not divide {hidden} {width}")
    else:
        size = width // count
    if size % 2 or size > MAX_HEAD_DIM:
        raise UnsupportedModelError(
            f"config.{heads}: heads of {size} elements are not supported, must be even and up to {MAX_HEAD_DIM}"
        )
    kv_count = fields.integer(kv_heads, MAX_HEADS) if kv_heads else count
    if count % kv_count:
        raise ConfigError(f"config.{kv_heads}: {kv_count} does not divide {heads} {count}")
    act = fields.get(activation)
    if not isinstance(act, str) or act not in activations:
        names = ", ".join(map(repr, activations))
        raise UnsupportedModelError(f"config.{activation} {shown(act)} is not supported. Supported: {names}.")
    return Encoder(
        family=family, layers=fields.integer(layers, MAX_LAYERS), hidden=width, inner=fields.integer(inner, MAX_WIDTH),
        vocab=fields.integer("vocab_size", MAX_VOCAB), heads=count, kv_heads=kv_count, head_dim=size,
        max_positions=fields.integer("max_position_embeddings", MAX_POSITIONS),
        eps=fields.epsilon(eps) if fixed_eps is None else fixed_eps, activation=activations[act],
    )  # fmt: skip


def refuse_decoders(fields: Fields) -> None:
    """Raises UnsupportedModelError for BERT's forms that are not encoders, or have relative positions."""
    for name in ("is_decoder", "add_cross_attention"):
        if fields.flag(name):
            raise UnsupportedModelError(f"config.{name} true is not supported: the plan is that of an encoder")
    fields.only("position_embedding_type", None, "absolute")


def encoder_graph(
    e: Encoder, layer: Callable[[list[Node], Value, int], Value], last: Callable[[list[Node], Value], Value] | None = None
) -> Graph:
    """The unfused graph of an encoder.

    Args:
        e: the sizes.
        layer: appends the nodes of a layer.
        last: appends what follows the last layer, such as a norm.
    """
    nodes: list[Node] = []
    x = emit(nodes, "state_in", (), "embed", e.hidden)
    for index in range(e.layers):
        nodes.append(Node("hidden_out", (x,), attrs={"index": index}))
        x = layer(nodes, x, index)
    if last is not None:
        x = last(nodes, x)
    nodes.append(Node("hidden_out", (x,), attrs={"index": e.layers}))
    return Graph(e.family, nodes, e.vocab, e.hidden, e.layers + 1, NO_CACHE, e.max_positions)


def attention(
    nodes: list[Node], e: Encoder, qkv: tuple[Value, Value, Value], name: str, window: int = 0, scale: float | None = None
) -> Value:
    """Bidirectional attention; `window` as in the op. `scale`: None: 1 / sqrt(head_dim)."""
    return emit(
        nodes, "encoder_attention", qkv, name, qkv[0].width, heads=e.heads, kv_heads=e.kv_heads, head_dim=e.head_dim,
        scale=e.head_dim**-0.5 if scale is None else scale, window=window,
    )  # fmt: skip


def layer_norm(nodes: list[Node], e: Encoder, x: Value, name: str, path: str, bias: bool = True) -> Value:
    out = Value(name, x.width)
    weights = (f"{path}.weight", f"{path}.bias") if bias else (f"{path}.weight",)
    nodes.append(Node("layer_norm", (x,), (out,), weights, {"eps": e.eps}))
    return out


def post_norm_graph(e: Encoder, names: PostNormLayer) -> Graph:
    """The graph of an encoder of BERT's form: y = norm(x + attention(x)); the output is norm(y + MLP(y))."""

    def layer(nodes: list[Node], x: Value, index: int) -> Value:
        name, path = f"l{index}", names.path.format(index)
        q, k, v = (
            linear(nodes, x, f"{name}.{part}", e.hidden, f"{path}.{module}", bias=True)
            for part, module in zip("qkv", (names.q, names.k, names.v), strict=True)
        )
        attended = attention(nodes, e, (q, k, v), f"{name}.attn")
        out = linear(nodes, attended, f"{name}.o", e.hidden, f"{path}.{names.o}", bias=True)
        y = add(nodes, x, out, f"{name}.attn_out")
        y = layer_norm(nodes, e, y, f"{name}.attn_normed", f"{path}.{names.attention_norm}")
        up = linear(nodes, y, f"{name}.up", e.inner, f"{path}.{names.up}", bias=True)
        inner = emit(nodes, e.activation, (up,), f"{name}.h", e.inner)
        down = linear(nodes, inner, f"{name}.down", e.hidden, f"{path}.{names.down}", bias=True)
        return layer_norm(nodes, e, add(nodes, y, down, f"{name}.mlp_out"), f"{name}.out", f"{path}.{names.mlp_norm}")

    return encoder_graph(e, layer)
