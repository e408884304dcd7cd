"""The sizes of a decoder-only model, read from its config and checked."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import fields as fields_of
from typing import Any

from ..errors import ConfigError, UnsupportedModelError
from .fields import Fields
from .rope import RopeSpec, read_rope

# Larger than in any model, and small enough that checking a config can neither overflow nor allocate much memory.
MAX_LAYERS, MAX_HEADS, MAX_WIDTH, MAX_VOCAB, MAX_POSITIONS = 4096, 16384, 1 << 20, 1 << 24, (1 << 31) - 1


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """Sizes that every decoder has.

    Attributes:
        family: the `model_type`.
        layers, hidden, intermediate, vocab: number of layers; hidden size; width of dense MLPs; vocabulary size.
        max_positions: context length in tokens.
        eps: epsilon of the norms.
        tied: whether the head shares the embedding's weight.
        rope: rotary position embedding.
        mlp_bias: whether dense MLPs have biases.
    """

    family: str
    layers: int
    hidden: int
    intermediate: int
    vocab: int
    max_positions: int
    eps: float
    tied: bool
    rope: RopeSpec
    mlp_bias: bool = False


@dataclass(frozen=True, kw_only=True)
class Decoder(Trunk):
    """A decoder whose attention has keys and values per head.

    Attributes:
        heads, kv_heads, head_dim: query heads, key and value heads, and elements per head.
        windows: the attention window of each layer in tokens, 0: no window.
        qkv_bias, o_bias: whether these projections have biases.
        qk_norm: whether q and k are normalised per head.
    """

    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int, ...]
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False


def read_trunk(
    fields: Fields,
    family: str,
    rotated: int,
    name: str = "head_dim",
    *,
    mlp_bias: bool = False,
    partial: bool = False,
    eps: str = "rms_norm_eps",
    activation: str | None = "hidden_act",
) -> Trunk:
    """Reads and checks the fields that all families share.

    Args:
        fields: the config.
        family: the `model_type`.
        rotated: number of elements of a head that RoPE rotates.
        name: the config field that contains this number.
        mlp_bias: whether dense MLPs have biases.
        partial: whether RoPE may rotate only the first elements (`partial_rotary_factor`).
        eps, activation: names of the fields with the norms' epsilon and the MLPs' activation; None: it is always SiLU.

    Raises:
        UnsupportedModelError, ConfigError: a field has a value that is not supported, or not valid.
    """
    if activation is not None:
        fields.require(activation, "silu")
    vocab, pad = fields.integer("vocab_size", MAX_VOCAB), fields.get("pad_token_id")
    if pad is not None and (isinstance(pad, bool) or not isinstance(pad, int) or not -vocab <= pad < vocab):
        raise ConfigError(f"config.pad_token_id: expected a token id below vocab_size {vocab}, got {pad!r}")
    rope = read_rope(fields, rotated, fields.integer("max_position_embeddings", MAX_POSITIONS), name, partial=partial)
    if rope.room > MAX_POSITIONS:
        raise ConfigError(
            f"config.rope_parameters['factor']: gives a context of {rope.room} tokens, more than the maximum of {MAX_POSITIONS}"
        )
    return Trunk(
        family=family, layers=fields.integer("num_hidden_layers", MAX_LAYERS), hidden=fields.integer("hidden_size", MAX_WIDTH),
        intermediate=fields.integer("intermediate_size", MAX_WIDTH), vocab=vocab, max_positions=rope.room,
        eps=fields.epsilon(eps), tied=fields.flag("tie_word_embeddings"),
        rope=rope, mlp_bias=mlp_bias,
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
    mlp_bias: bool = False,
    qk_norm: bool = False,
    sliding: bool = False,
    **trunk: Any,
) -> Decoder:
    """Reads and checks the fields of a decoder whose attention has keys and values per head.

    Args:
        fields: the config.
        family: the `model_type`.
        qkv_bias, o_bias, mlp_bias, qk_norm: as in `Decoder` and `Trunk`.
        sliding: whether the family's attention supports sliding windows.
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
    common = read_trunk(fields, family, head_dim, mlp_bias=mlp_bias, **trunk)
    return Decoder(
        **parts_of(common), heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        windows=_windows(fields, common.layers) if sliding else (0,) * common.layers,
        qkv_bias=qkv_bias, o_bias=o_bias, qk_norm=qk_norm,
    )  # fmt: skip


def read_layer_kinds(fields: Fields, layers: int, *supported: str) -> tuple[str, ...]:
    """The config's `layer_types`, one of `supported` for each layer.

    Raises:
        UnsupportedModelError, ConfigError: the field has a value that is not supported, or not valid.
    """
    kinds = fields.get("layer_types")
    if not isinstance(kinds, (list, tuple)) or len(kinds) != layers:
        raise ConfigError(f"config.layer_types: expected one entry for each of {layers} layers, got {kinds!r}")
    for kind in kinds:
        if kind not in supported:
            names = ", ".join(map(repr, supported))
            raise UnsupportedModelError(f"config.layer_types: {kind!r} is not supported. Supported: {names}.")
    return tuple(kinds)


def _windows(fields: Fields, layers: int) -> tuple[int, ...]:
    """The window of each layer, from `layer_types`, or from `max_window_layers` if the config has no such list."""
    used = fields.flag("use_sliding_window") and fields.get("sliding_window") is not None
    kinds = fields.get("layer_types")
    if kinds is None:
        first = fields.get("max_window_layers", layers)
        if isinstance(first, bool) or not isinstance(first, int):
            raise ConfigError(f"config.max_window_layers: expected an integer, got {first!r}")
        kinds = ["sliding_attention" if used and i >= first else "full_attention" for i in range(layers)]
    if not isinstance(kinds, (list, tuple)) or len(kinds) != layers:
        raise ConfigError(f"config.layer_types: expected one entry for each of {layers} layers, got {kinds!r}")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(
                f"config.layer_types: {kind!r} is not supported. Supported: 'full_attention', 'sliding_attention'."
            )
    if "sliding_attention" not in kinds:
        return (0,) * layers
    if not used:
        raise ConfigError("config.layer_types: has sliding_attention, but use_sliding_window and sliding_window set no window")
    window = fields.integer("sliding_window", MAX_POSITIONS)
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
