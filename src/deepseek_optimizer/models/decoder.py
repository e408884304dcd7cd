"""The sizes of a decoder-only model, read from its config and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from dataclasses import fields as fields_of
from typing import Any, Literal

from ..errors import ConfigError, UnsupportedModelError, shown
from .fields import Fields
from .rope import PositionScale, RopeSpec, read_rope

ACTIVATIONS = {"silu": "silu", "gelu": "gelu_pytorch_tanh"}  # of an MLP -> name in configs

# Larger than in any model, and small enough that checking a config can neither overflow nor allocate much memory.
MAX_LAYERS, MAX_HEADS, MAX_WIDTH, MAX_VOCAB, MAX_POSITIONS = 4096, 16384, 1 << 20, 1 << 24, (1 << 31) - 1
MAX_KERNEL = 64  # taps of a short convolution


@dataclass(frozen=True, kw_only=True)
class LayerNorms:
    """Names of the norms in a decoder layer's module; "" for those that it does not have.

    Attributes:
        attention_in, mlp_in: of the input of attention and of the MLP.
        attention_out, mlp_out: of their results, before they are added to the residual.
        parallel: attention and MLP have the same input, normalized by `attention_in`.
    """

    attention_in: str = "input_layernorm"
    attention_out: str = ""
    mlp_in: str = "post_attention_layernorm"
    mlp_out: str = ""
    parallel: bool = False


POST_NORMS = LayerNorms(
    attention_in="", attention_out="post_attention_layernorm", mlp_in="", mlp_out="post_feedforward_layernorm"
)
PARALLEL = LayerNorms(mlp_in="", parallel=True)


@dataclass(frozen=True, kw_only=True)
class MlpForm:
    """The dense MLPs of a model.

    Attributes:
        activation: "silu" or "gelu" (with tanh).
        gate, up, down: names of the projections. gate is "": the MLP has no gate; gate equals up: one matrix with the rows of
            the gate, then those of up.
        bias: whether the projections have biases.
    """

    activation: Literal["silu", "gelu"] = "silu"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    bias: bool = False


FUSED_MLP = MlpForm(gate="gate_up_proj", up="gate_up_proj")


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """Sizes that every decoder has.

    Attributes:
        family: the `model_type`.
        layers, hidden, intermediate, vocab: number of layers; hidden size; width of dense MLPs; vocabulary size.
        max_positions: context length in tokens.
        eps: epsilon of the norms.
        tied: whether the head shares the embedding's weight.
        ropes: rotary position embeddings, of which layers use one or none.
        layer_ropes: per layer the index in `ropes`, None: the layer has no RoPE; (): all layers use the first.
        mlp: form of dense MLPs.
        norm: "rms"; "rms_offset": RMS norm with the factor 1 + w; "layer": layer norm.
        norm_bias: whether layer norms have biases.
        layer_norms: which norms a layer has.
        final_norm: path of the norm after the last layer.
        embedding_scale: factor of the embedding table's rows.
        input_scale: factor of the input of the first layer, whether it comes from the table or from the caller.
        residual_scale: factor of what a layer's attention and MLP add to the residual.
        logit_scale, logit_softcap: factor and limit of logits, see op `lm_head`.
        position_scales: per layer the position-dependent factor of the queries, None: the layer has none; (): no layer has.
    """

    family: str
    layers: int
    hidden: int
    intermediate: int
    vocab: int
    max_positions: int
    eps: float
    tied: bool
    ropes: tuple[RopeSpec, ...]
    layer_ropes: tuple[int | None, ...] = ()
    mlp: MlpForm = MlpForm()  # noqa: RUF009  # immutable
    norm: Literal["rms", "rms_offset", "layer"] = "rms"
    norm_bias: bool = False
    layer_norms: LayerNorms = LayerNorms()  # noqa: RUF009  # immutable
    final_norm: str = "model.norm"
    embedding_scale: float = 1.0
    input_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    position_scales: tuple[PositionScale | None, ...] = ()

    @property
    def rope(self) -> RopeSpec:
        """The first rotary position embedding, in most models the only one."""
        return self.ropes[0]

    def rope_of(self, layer: int) -> int | None:
        """Index in `ropes` of a layer's rotary position embedding; None if it has none."""
        return self.layer_ropes[layer] if self.layer_ropes else 0


@dataclass(frozen=True, kw_only=True)
class Decoder(Trunk):
    """A decoder whose attention has keys and values per head.

    Attributes:
        heads, kv_heads, head_dim: query heads, key and value heads, and elements per head.
        windows: the attention window of each layer in tokens, 0: no window.
        chunked: windows are chunks at fixed places, see op `attention`.
        scale: factor of the scores.
        qkv_bias, o_bias: whether these projections have biases.
        qk_norm: "head": q and k are normalized per head; "row": over all heads; "": not at all.
        qk_norm_after_rope: whether that follows RoPE; layers without RoPE then have no such norm.
        qk_norm_names: names of the norms of q and k; "": a norm without a weight.
        rope_interleaved: whether rotated pairs are (2i, 2i + 1) instead of (i, i + rot/2).
        fused_qkv: name of the one projection with the rows of q, k and v; "": there are three.
        attention_softcap: limit of the scores, 0: none; see op `attention`.
        head_sinks: name of the parameter with a further logit per head; "": none.
        o_name: name of the output projection.
        gated: q_proj also computes a gate per head, next to each query; the result is multiplied by its sigmoid.
        cache_layers: the layer of the cache of each layer with attention; (): that of the same number.
        cache_heads: (kv_heads, head_dim) of each layer's attention; (): those above.
        own_kv: whether each layer has keys and values of its own; otherwise it reads the cache of an earlier layer, and has
            only queries. (): all have.
        key_is_value: whether each layer's v is the product of its k_proj, before the key's norm and RoPE. (): none.
        v_norm: whether v is normalized per head, without a weight.
        causal: whether each layer's rows never see later tokens, even those of their picture. (): none.
    """

    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int, ...]
    scale: float
    chunked: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["", "head", "row"] = ""
    qk_norm_after_rope: bool = False
    qk_norm_names: tuple[str, str] = ("q_norm", "k_norm")
    rope_interleaved: bool = False
    fused_qkv: str = ""
    attention_softcap: float = 0.0
    head_sinks: str = ""
    o_name: str = "o_proj"
    gated: bool = False
    cache_layers: tuple[int, ...] = ()
    cache_heads: tuple[tuple[int, int], ...] = ()
    own_kv: tuple[bool, ...] = ()
    key_is_value: tuple[bool, ...] = ()
    v_norm: bool = False
    causal: tuple[bool, ...] = ()

    def cache_layer(self, layer: int) -> int:
        """The layer of the cache that this layer's attention uses."""
        return self.cache_layers[layer] if self.cache_layers else layer

    def cache_heads_of(self, layer: int) -> tuple[int, int]:
        """(kv_heads, head_dim) of this layer's attention."""
        return self.cache_heads[layer] if self.cache_heads else (self.kv_heads, self.head_dim)


def read_trunk(
    fields: Fields,
    family: str,
    rotated: int,
    name: str = "head_dim",
    *,
    mlp: MlpForm = MlpForm(),  # noqa: B008  # immutable
    activation: str | None = "hidden_act",
    eps: str = "rms_norm_eps",
    width: str = "intermediate_size",
    ropes: Callable[[int, int], tuple[RopeSpec, ...]] | None = None,
) -> Trunk:
    """Reads and checks the fields that all families share.

    Args:
        fields: the config.
        family: the `model_type`.
        rotated: number of elements of a head that RoPE rotates.
        name: the config field that contains this number.
        mlp: form of dense MLPs.
        activation: name of the field with the activation; None: it is not checked.
        eps, width: names of the fields with the norms' epsilon and the width of dense MLPs.
        ropes: reads rotary position embeddings, given `rotated` and max_position_embeddings; (): the caller does; None: all
            layers have the same.

    Raises:
        UnsupportedModelError, ConfigError: a field has a value that is not supported, or not valid.
    """
    if activation is not None:
        fields.require(activation, ACTIVATIONS[mlp.activation])
    vocab, pad = fields.integer("vocab_size", MAX_VOCAB), fields.get("pad_token_id")
    if pad is not None and (isinstance(pad, bool) or not isinstance(pad, int) or not -vocab <= pad < vocab):
        raise ConfigError(f"config.pad_token_id: expected a token id below vocab_size {vocab}, got {pad!r}")
    positions = fields.integer("max_position_embeddings", MAX_POSITIONS)
    read = (read_rope(fields, rotated, positions, name),) if ropes is None else ropes(rotated, positions)
    room = read[0].room if read else positions
    if room > MAX_POSITIONS:
        raise ConfigError(
            f"config.rope_parameters['factor']: gives a context of {room} tokens, more than the maximum of {MAX_POSITIONS}"
        )
    return Trunk(
        family=family, layers=fields.integer("num_hidden_layers", MAX_LAYERS), hidden=fields.integer("hidden_size", MAX_WIDTH),
        intermediate=fields.integer(width, MAX_WIDTH), vocab=vocab, max_positions=room,
        eps=fields.epsilon(eps), tied=fields.flag("tie_word_embeddings"),
        ropes=read, mlp=mlp,
    )  # fmt: skip


def parts_of(trunk: Trunk) -> dict[str, Any]:
    """The trunk's fields by name, to construct a subclass."""
    return {field.name: getattr(trunk, field.name) for field in fields_of(Trunk)}


def read_decoder(
    fields: Fields,
    family: str,
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    sliding: bool = False,
    partial: float | None = None,
    **trunk: Any,
) -> Decoder:
    """Reads and checks the fields of a decoder whose attention has keys and values per head.

    Args:
        fields: the config.
        family: the `model_type`.
        qkv_bias, o_bias: as in `Decoder`.
        sliding: whether the family's attention has sliding windows as Qwen2's (`layer_types` or `max_window_layers`).
        partial: the share of a head that is rotated, see `read_rope`.
        trunk: further arguments of `read_trunk`.

    Raises:
        UnsupportedModelError, ConfigError: a field has a value that is not supported, or not valid.
    """
    hidden = fields.integer("hidden_size", MAX_WIDTH)
    heads = fields.integer("num_attention_heads", MAX_HEADS)
    kv_heads = fields.integer("num_key_value_heads", MAX_HEADS, default=heads)
    if heads % kv_heads:
        raise ConfigError(f"config.num_key_value_heads: {kv_heads} does not divide num_attention_heads {heads}")
    if fields.get("head_dim") is None and hidden % heads:
        raise ConfigError(f"config.num_attention_heads: {heads} does not divide hidden_size {hidden}, and there is no head_dim")
    head_dim = fields.integer("head_dim", MAX_WIDTH, default=hidden // heads)
    if heads * head_dim > MAX_WIDTH:
        raise ConfigError(f"config.head_dim: {heads} heads of {head_dim} elements exceed the maximum width of {MAX_WIDTH}")
    if partial is not None:
        trunk["ropes"] = lambda _, positions: (read_rope(fields, head_dim, positions, partial=partial),)
    read = read_trunk(fields, family, head_dim, **trunk)
    return Decoder(
        **parts_of(read), heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=head_dim**-0.5,
        windows=_windows(fields, read.layers) if sliding else (0,) * read.layers, qkv_bias=qkv_bias, o_bias=o_bias,
    )  # fmt: skip


def _windows(fields: Fields, layers: int) -> tuple[int, ...]:
    """The window of each layer, from `layer_types`, or from `max_window_layers` if the config has no such list."""
    used = fields.flag("use_sliding_window") and fields.get("sliding_window") is not None
    first = fields.get("max_window_layers", layers)
    if fields.get("layer_types") is None and (isinstance(first, bool) or not isinstance(first, int)):
        raise ConfigError(f"config.max_window_layers: expected an integer, got {first!r}")
    kinds = read_layer_types(fields, layers, lambda layer: used and layer >= first)
    if not used and SLIDING in kinds:
        raise ConfigError("config.layer_types: has sliding_attention, but use_sliding_window and sliding_window set no window")
    return windows_of(fields, kinds)


FULL, SLIDING = "full_attention", "sliding_attention"


def read_layer_types(fields: Fields, layers: int, slides: Callable[[int], bool]) -> tuple[str, ...]:
    """Each layer's type, FULL or SLIDING, from `layer_types`; without it, those for which `slides` is true slide."""
    kinds = fields.get("layer_types")
    if kinds is None:
        kinds = [SLIDING if slides(layer) else FULL for layer in range(layers)]
    if not isinstance(kinds, (list, tuple)) or len(kinds) != layers:
        raise ConfigError(f"config.layer_types: expected one entry for each of {layers} layers, got {kinds!r}")
    for kind in kinds:
        if kind not in (FULL, SLIDING):
            raise UnsupportedModelError(f"config.layer_types: {kind!r} is not supported. Supported: {FULL!r}, {SLIDING!r}.")
    return tuple(kinds)


def read_layer_kinds(fields: Fields, layers: int, *supported: str) -> tuple[str, ...]:
    """The config's `layer_types` in a family that has other types of layers: one of `supported` for each layer."""
    kinds = fields.get("layer_types")
    if not isinstance(kinds, (list, tuple)) or len(kinds) != layers:
        raise ConfigError(f"config.layer_types: expected one entry for each of {layers} layers, got {kinds!r}")
    for kind in kinds:
        if kind not in supported:
            names = ", ".join(map(repr, supported))
            raise UnsupportedModelError(f"config.layer_types: {kind!r} is not supported. Supported: {names}.")
    return tuple(kinds)


def read_nope_layers(fields: Fields, layers: int) -> tuple[int | None, ...]:
    """Each layer's RoPE, as `Trunk.layer_ropes`, from `no_rope_layers`, which has 1 for layers with RoPE; without it, each
    `no_rope_layer_interval`-th has none."""
    used = fields.get("no_rope_layers")
    if used is None:
        interval = fields.integer("no_rope_layer_interval", MAX_LAYERS, default=4)
        used = [int((layer + 1) % interval != 0) for layer in range(layers)]
    if not isinstance(used, (list, tuple)) or len(used) < layers or any(value not in (0, 1) for value in used):
        raise ConfigError(f"config.no_rope_layers: expected 0 or 1 for each of {layers} layers, got {shown(used)}")
    return tuple(0 if value else None for value in used[:layers])


def windows_of(fields: Fields, kinds: Sequence[str]) -> tuple[int, ...]:
    """The window of each layer, given its type: `sliding_window`, or 0."""
    if SLIDING not in kinds:
        return (0,) * len(kinds)
    window = fields.integer("sliding_window", MAX_POSITIONS)
    return tuple(window if kind == SLIDING else 0 for kind in kinds)


def same_window(fields: Fields, layers: int) -> tuple[int, ...]:
    """The windows of a family all of whose layers have `sliding_window`; none if it is not set."""
    return windows_of(fields, [FULL if fields.get("sliding_window") is None else SLIDING] * layers)


def ropes_by_type(
    fields: Fields, head_dim: int, kinds: Sequence[str], positions: int, sliding_theta: str = "rope_theta"
) -> tuple[tuple[RopeSpec, ...], tuple[int | None, ...]]:
    """Rotary position embeddings where full and sliding layers have parameters of their own, and the index of each layer's.

    In older configs with one set of parameters, scaling applies to full layers only.

    Args:
        head_dim: number of rotated elements of a head.
        kinds: each layer's type.
        positions: max_position_embeddings.
        sliding_theta: older name of the sliding layers' `rope_theta`.
    """
    full = read_rope(fields, head_dim, positions, layer_type=FULL)
    sliding = read_rope(fields, head_dim, positions, layer_type=SLIDING, theta=sliding_theta, scaled=False)
    return (full, sliding), tuple(int(kind == SLIDING) for kind in kinds)
