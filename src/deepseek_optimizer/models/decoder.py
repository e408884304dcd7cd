"""What a decoder-only model's config says, checked: the numbers that the blocks are built from."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import fields as fields_of
from typing import Any

from ..errors import ConfigError, UnsupportedModelError
from .fields import Fields
from .rope import RopeSpec, read_rope

# Beyond what any model has, and low enough that no product of two overflows or takes memory while it is looked at.
MAX_LAYERS, MAX_HEADS, MAX_WIDTH, MAX_VOCAB, MAX_POSITIONS = 4096, 16384, 1 << 20, 1 << 24, (1 << 31) - 1


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """Sizes that every decoder has. tied: the head is the embedding. mlp_bias: whether dense MLPs have biases."""

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
    """A model whose attention has keys and values per head.

    windows: per layer, how many tokens attention sees, 0 for all. qkv_bias, o_bias: which projections have one. qk_norm:
    whether q and k are normed per head."""

    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int, ...]
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False


def read_trunk(fields: Fields, family: str, turning: int, name: str = "head_dim", *, mlp_bias: bool = False) -> Trunk:
    """Reads and checks the fields that all families share.

    Args:
        turning: how many numbers of a head RoPE turns; `name` is the field that says so.
    """
    fields.require("hidden_act", "silu")
    vocab, pad = fields.integer("vocab_size", MAX_VOCAB), fields.get("pad_token_id")
    if pad is not None and (isinstance(pad, bool) or not isinstance(pad, int) or not -vocab <= pad < vocab):
        raise ConfigError(f"config.pad_token_id: expected a token below vocab_size {vocab}, got {pad!r}")
    rope = read_rope(fields, turning, fields.integer("max_position_embeddings", MAX_POSITIONS), name)
    if rope.room > MAX_POSITIONS:
        raise ConfigError(f"config.rope_parameters['factor']: makes room for {rope.room} tokens, {MAX_POSITIONS} at most")
    return Trunk(
        family=family, layers=fields.integer("num_hidden_layers", MAX_LAYERS), hidden=fields.integer("hidden_size", MAX_WIDTH),
        intermediate=fields.integer("intermediate_size", MAX_WIDTH), vocab=vocab, max_positions=rope.room,
        eps=fields.epsilon("rms_norm_eps"), tied=fields.flag("tie_word_embeddings"),
        rope=rope, mlp_bias=mlp_bias,
    )  # fmt: skip


def parts_of(trunk: Trunk) -> dict[str, Any]:
    """The trunk's fields by name, to build what has more of them."""
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
) -> Decoder:
    """Reads and checks the fields of a model whose attention has keys and values per head.

    Args:
        sliding: whether the family's attention knows sliding windows.
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
        raise ConfigError(f"config.head_dim: {heads} heads of {head_dim} are wider than {MAX_WIDTH}")
    trunk = read_trunk(fields, family, head_dim, mlp_bias=mlp_bias)
    return Decoder(
        **parts_of(trunk), heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        windows=_windows(fields, trunk.layers) if sliding else (0,) * trunk.layers,
        qkv_bias=qkv_bias, o_bias=o_bias, qk_norm=qk_norm,
    )  # fmt: skip


def _windows(fields: Fields, layers: int) -> tuple[int, ...]:
    """Per layer the window, from `layer_types`, or from `max_window_layers` where a config.json has no such list."""
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
                f"config.layer_types: {kind!r} is not supported. Known: 'full_attention', 'sliding_attention'."
            )
    if "sliding_attention" not in kinds:
        return (0,) * layers
    if not used:
        raise ConfigError("config.layer_types: has sliding_attention, but use_sliding_window and sliding_window give no window")
    window = fields.integer("sliding_window", MAX_POSITIONS)
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
