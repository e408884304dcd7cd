"""Multi-head latent attention: reads it from a config and builds its graph nodes.

Keys and values of all heads are computed from one latent per token. The cache holds only this latent and one rotated key, which
the heads share. Source: DeepSeek-V2 (2024), section 2.1; the indexer, which selects the visible tokens: DeepSeek-V3.2 (2025),
section 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, UnsupportedModelError
from ..graph.ir import LatentSpec, Node, Value
from .blocks import Attend, emit, linear, rms_norm, scale_by_position
from .decoder import MAX_HEADS, MAX_WIDTH, MlpForm, Trunk, parts_of, read_trunk
from .fields import Fields
from .rope import RopeSpec, read_rope

INNER_EPS = 1e-6  # epsilon of the norms inside attention: Transformers does not use the config's rms_norm_eps there
MAX_SPARSE_POSITIONS = 1 << 24  # token indices are passed as float32, which is exact up to here


@dataclass(frozen=True)
class Indexer:
    """The lightning indexer: each token has `heads` queries and one key of `width` elements, and attends to `top_k` tokens.

    Attributes:
        interleaved: whether rotated pairs are (2i, 2i + 1) instead of (i, i + rot/2), as in `LatentDecoder`.
        shared: for each layer whether it uses the tokens chosen in the layer before it; (): each layer chooses its own.
    """

    heads: int
    width: int
    top_k: int
    interleaved: bool = False
    shared: tuple[bool, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LatentDecoder(Trunk):
    """A model with latent attention.

    Attributes:
        heads: number of heads.
        nope, v_dim: elements of a query or key head without rotation (`rope.rot` more are rotated), and of a value head.
        rank: elements of the latent.
        q_rank: elements of the queries' latent; None: queries have none.
        interleaved: whether rotated pairs are (2i, 2i + 1) instead of (i, i + rot/2).
        scale: factor of the scores.
        bias: whether the projections to latents and the output projection have biases.
        indexer: the lightning indexer; None: the model has none.
        cache_layers: the layer of the cache of each layer with attention; (): that of the same number.
    """

    heads: int
    nope: int
    v_dim: int
    rank: int
    q_rank: int | None
    interleaved: bool
    scale: float
    bias: bool
    indexer: Indexer | None = None
    cache_layers: tuple[int, ...] = ()

    @property
    def cache(self) -> LatentSpec:
        return LatentSpec(self.layers, self.rank, self.rope.rot, self.indexer.width if self.indexer else 0)


def read_latent_decoder(
    fields: Fields,
    family: str,
    *,
    interleaved: bool,
    mlp_bias: bool = False,
    sparse: bool = False,
    partial: bool = False,
) -> LatentDecoder:
    """Reads and checks the fields of a model with latent attention.

    Args:
        fields: the config.
        family: the `model_type`.
        interleaved: as in `LatentDecoder`.
        mlp_bias: whether dense MLPs have biases.
        sparse: whether the family has a lightning indexer.
        partial: whether the rotated elements are given as a share of a whole head, as in `rope_parameters` of Mistral 4.

    Raises:
        UnsupportedModelError, ConfigError: a field has a value that is not supported, or not valid.
    """
    heads = fields.integer("num_attention_heads", MAX_HEADS)
    if fields.integer("num_key_value_heads", MAX_HEADS, default=heads) != heads:
        raise ConfigError(
            f"config.num_key_value_heads: latent attention needs the same number as num_attention_heads ({heads}), "
            f"got {fields.get('num_key_value_heads')!r}"
        )
    nope, rotated, v_dim, rank = (
        fields.integer(name, MAX_WIDTH) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
    )
    q, kv = heads * (nope + rotated), heads * (nope + v_dim)
    for name, width in (("qk_nope_head_dim", q), ("v_head_dim", kv), ("kv_lora_rank", rank + rotated)):
        if width > MAX_WIDTH:
            raise ConfigError(
                f"config.{name}: {fields.get(name)} gives rows of {width} elements, more than the maximum of {MAX_WIDTH}"
            )
    q_rank = None if fields.get("q_lora_rank") is None and not sparse else fields.integer("q_lora_rank", MAX_WIDTH)
    ropes = (lambda _, positions: (_partial_rope(fields, nope, rotated, positions),)) if partial else None
    trunk = read_trunk(fields, family, rotated, "qk_rope_head_dim", mlp=MlpForm(bias=mlp_bias), ropes=ropes)
    if sparse and trunk.max_positions > MAX_SPARSE_POSITIONS:
        limit = f"expected at most {MAX_SPARSE_POSITIONS} with an indexer"
        raise ConfigError(f"config.max_position_embeddings: {limit}, got {trunk.max_positions}")
    return LatentDecoder(
        **parts_of(trunk), heads=heads, nope=nope, v_dim=v_dim, rank=rank, q_rank=q_rank, interleaved=interleaved,
        scale=(nope + rotated) ** -0.5 * trunk.rope.attention_scale, bias=fields.flag("attention_bias"),
        indexer=_indexer(fields, rotated) if sparse else None,
    )  # fmt: skip


def _partial_rope(fields: Fields, nope: int, rotated: int, positions: int) -> RopeSpec:
    """The rotary position embedding of a family whose RoPE is that of a share of a whole head, unrotated elements included."""
    rope = read_rope(fields, nope + rotated, positions, "qk_rope_head_dim", partial=rotated / (nope + rotated))
    if rope.kind == "default":  # Transformers would rotate the whole head, which is wider than what it rotates
        raise UnsupportedModelError("config.rope_parameters: rope_type 'default' is not supported in this family")
    if rope.rot != rotated:
        raise ConfigError(
            f"config.rope_parameters['partial_rotary_factor']: gives {rope.rot} rotated elements of a head, but "
            f"qk_rope_head_dim is {rotated}"
        )
    return rope


def _indexer(fields: Fields, rotated: int) -> Indexer:
    heads, width = fields.integer("index_n_heads", MAX_HEADS), fields.integer("index_head_dim", MAX_WIDTH)
    if width < rotated:
        raise ConfigError(f"config.index_head_dim: {width} is less than qk_rope_head_dim ({rotated})")
    if heads * width > MAX_WIDTH:
        raise ConfigError(f"config.index_head_dim: {heads} heads of {width} elements exceed the maximum width of {MAX_WIDTH}")
    return Indexer(heads, width, fields.integer("index_topk", MAX_WIDTH))


def attention(d: LatentDecoder) -> Attend:
    """Projections through latents, RoPE of part of each head, cache write, attention over latents, output projection."""

    choices: dict[int, Value] = {}  # by layer

    def attend(nodes: list[Node], x: Value, table: Value | None, layer: int) -> Value:
        assert table is not None  # all layers have RoPE
        name, path = f"l{layer}", f"model.layers.{layer}.self_attn"
        head, width = d.nope + d.rope.rot, d.rank + d.rope.rot
        q_from, q_path = x, f"{path}.q_proj"
        if d.q_rank is not None:
            down = linear(nodes, x, f"{name}.q_a", d.q_rank, f"{path}.q_a_proj", d.bias)
            q_from = rms_norm(nodes, down, f"{name}.q_latent", f"{path}.q_a_layernorm", INNER_EPS)
            q_path = f"{path}.q_b_proj"
        q = linear(nodes, q_from, f"{name}.q", d.heads * head, q_path)
        q = emit(
            nodes, "rope", (q, table), f"{name}.q_rope", q.width, heads=d.heads, head_dim=head, offset=d.nope,
            interleaved=d.interleaved,
        )  # fmt: skip
        q = scale_by_position(nodes, d, q, f"{name}.q_scaled", layer)
        kv_a = linear(nodes, x, f"{name}.kv_a", width, f"{path}.kv_a_proj_with_mqa", d.bias)
        latent = emit(
            nodes, "latent", (kv_a, table), f"{name}.latent", width, f"{path}.kv_a_layernorm.weight", eps=INNER_EPS,
            rank=d.rank, interleaved=d.interleaved,
        )  # fmt: skip
        place = d.cache_layers[layer] if d.cache_layers else layer
        nodes.append(Node("latent_write", (latent,), attrs={"layer": place}))
        if d.indexer and d.indexer.shared and d.indexer.shared[layer]:
            choices[layer] = choices[layer - 1]
        elif d.indexer:
            choices[layer] = _choose(nodes, d.indexer, x, q_from, table, layer)
        chosen = (choices[layer],) if d.indexer else ()
        attended = emit(
            nodes, "mla_attention", (q, *chosen), f"{name}.attn", d.heads * d.v_dim, f"{path}.kv_b_proj.weight", layer=place,
            heads=d.heads, nope=d.nope, rope=d.rope.rot, rank=d.rank, v_dim=d.v_dim, scale=d.scale, form="expanded",
        )  # fmt: skip
        return linear(nodes, attended, f"{name}.o", d.hidden, f"{path}.o_proj", d.bias)

    return attend


def _choose(nodes: list[Node], indexer: Indexer, x: Value, q_latent: Value, table: Value, layer: int) -> Value:
    """The visible tokens of each token. Unlike in attention, the rotated elements of a head come first."""
    name, path = f"l{layer}.index", f"model.layers.{layer}.self_attn.indexer"
    rotation: dict[str, Any] = {"head_dim": indexer.width, "offset": 0, "interleaved": indexer.interleaved}
    q = linear(nodes, q_latent, f"{name}_q", indexer.heads * indexer.width, f"{path}.wq_b")
    q = emit(nodes, "rope", (q, table), f"{name}_q_rope", q.width, heads=indexer.heads, **rotation)
    k, normed = linear(nodes, x, f"{name}_k", indexer.width, f"{path}.wk"), Value(f"{name}_k_norm", indexer.width)
    nodes.append(Node("layer_norm", (k,), (normed,), (f"{path}.k_norm.weight", f"{path}.k_norm.bias"), {"eps": INNER_EPS}))
    k = emit(nodes, "rope", (normed, table), f"{name}_k_rope", k.width, heads=1, **rotation)
    nodes.append(Node("index_write", (k,), attrs={"layer": layer}))
    weights = linear(nodes, x, f"{name}_w", indexer.heads, f"{path}.weights_proj")
    return emit(
        nodes, "index_choose", (q, weights), f"{name}_chosen", indexer.top_k, layer=layer, heads=indexer.heads,
        index=indexer.width, top_k=indexer.top_k, scale=(indexer.width * indexer.heads) ** -0.5,
    )  # fmt: skip
