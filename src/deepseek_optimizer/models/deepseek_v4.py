"""DeepSeek-V4: hyper-connections, and attention over a window and compressed entries.

All heads share one row per token, which is both key and value; see `graph/ops/compressed.py`. Its rotated part is turned back
in the output, by a table of the negative angles. Layers without entries have a RoPE of their own. Experts of the first layers
are chosen by the token's id. Source: `modeling_deepseek_v4.py` of Transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigError, UnsupportedModelError, shown
from ..graph.ir import CachedRows, Graph, Node, RowsSpec, Value
from .blocks import FeedForward, add, emit, linear, norm, rms_norm
from .decoder import MAX_HEADS, MAX_LAYERS, MAX_POSITIONS, MAX_WIDTH, Trunk, read_layer_kinds, read_trunk
from .experts import ClampedForm, feed_forward, read_plain_routing
from .fields import Fields
from .mla import MAX_SPARSE_POSITIONS, Indexer
from .rope import RopeSpec, read_rope
from .streams import Streams, collapse, expand, spread, stream_weights

SLIDING, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
_RATIOS = {0: SLIDING, 4: SPARSE, 128: HEAVY}  # entries of compress_ratios
MAIN, COMPRESS = 0, 1  # index of a layer's RoPE
MAX_STREAMS, MAX_STEPS = 64, 1024


@dataclass(frozen=True)
class _Attention:
    """Sizes of attention.

    Attributes:
        heads, head_dim: heads, and elements of a query and of the row that all heads read.
        q_rank: elements of the queries' latent.
        window: last tokens whose rows are read.
        groups, o_rank: groups of the output projection, and elements of each group's result.
        kinds: the type of each layer.
        every: tokens of an entry, by type of layer.
        indexer: chooses entries in layers of type SPARSE.
    """

    heads: int
    head_dim: int
    q_rank: int
    window: int
    groups: int
    o_rank: int
    kinds: tuple[str, ...]
    every: dict[str, int]
    indexer: Indexer


class _Cache:
    """Collects the kinds of rows in the cache."""

    def __init__(self) -> None:
        self.rows: list[CachedRows] = []

    def add(self, width: int, **options: Any) -> int:
        """The index of a new kind."""
        self.rows.append(CachedRows(width, **options))
        return len(self.rows) - 1


@dataclass(frozen=True)
class _Decoder:
    """What the graphs of the model and of its MTP layers are built from: sizes, and a layer's feed-forward network."""

    d: Trunk
    attention: _Attention
    streams: Streams
    forward: FeedForward


def build(fields: Fields) -> Graph:
    m, cache = _read(fields), _Cache()
    nodes: list[Node] = []
    x = emit(nodes, "embedding", (), "embed", m.d.hidden, "model.embed_tokens.weight", scale=1.0)
    tables = _tables(nodes, m.d, m.attention.kinds)
    streams = spread(nodes, m.streams, x)
    for layer in range(m.d.layers):
        streams = _layer(nodes, m, cache, tables, streams, layer)
    head = "model.embed_tokens.weight" if m.d.tied else "lm_head.weight"
    _results(nodes, m, streams, "model.hc_head", m.d.final_norm, head)
    return Graph(m.d.family, nodes, m.d.vocab, m.d.hidden, 1, RowsSpec(tuple(cache.rows)), m.d.max_positions)


def build_mtp(fields: Fields, depth: int, layers: int) -> Graph:
    """An MTP layer: a layer with a window over streams that are computed from those of the model (or of the previous MTP layer)
    and from the embedding of the next token. It collapses its streams by weights of its own. In the cache, the rows of MTP
    layers follow the model's. Source: `MTPBlock` in DeepSeek's own code for V4."""
    main = build(fields)
    assert isinstance(main.cache, RowsSpec)
    m = _read(fields)
    m = replace(m, attention=replace(m.attention, kinds=(*m.attention.kinds, *(SLIDING,) * layers)))
    layer, s, cache = m.d.layers + depth, m.streams, _Cache()
    name, path = f"l{layer}", f"model.layers.{layer}"
    window = CachedRows(m.attention.head_dim, window=m.attention.window)
    cache.rows += [*main.cache.rows, *(window,) * depth]
    nodes: list[Node] = []
    embedded = emit(nodes, "embedding", (), "embed", m.d.hidden, f"{path}.embed_tokens.weight", scale=1.0)
    tables = _tables(nodes, m.d, (SLIDING,))
    embedded = norm(nodes, m.d, embedded, f"{name}.embed_norm", f"{path}.enorm")
    embedded = spread(nodes, s, linear(nodes, embedded, f"{name}.embed_in", m.d.hidden, f"{path}.e_proj"))
    state = emit(nodes, "state_in", (), "state", s.count * m.d.hidden)
    state = emit(
        nodes, "head_norm", (state,), f"{name}.state_norm", state.width, f"{path}.hnorm.weight", eps=m.d.eps, heads=s.count,
        head_dim=m.d.hidden,
    )  # fmt: skip
    state = emit(
        nodes, "grouped_linear", (state,), f"{name}.state_in", state.width, f"{path}.h_proj.weight", groups=s.count, shared=True
    )
    streams = _layer(nodes, m, cache, tables, add(nodes, embedded, state, f"{name}.in"), layer)
    _results(nodes, m, streams, f"{path}.hc_head", f"{path}.shared_head.norm", f"{path}.shared_head.head.weight")
    rows = (*cache.rows, *(window,) * (layers - depth - 1))
    return Graph(m.d.family, nodes, m.d.vocab, m.d.hidden, 1, RowsSpec(rows), m.d.max_positions)


def _read(fields: Fields) -> _Decoder:
    fields = _current(fields)
    fields.only("attention_bias", None, False)
    fields.only("mlp_bias", None, False)
    fields.only("num_key_value_heads", 1)
    fields.only("n_shared_experts", 1)  # Transformers would ignore another number
    head_dim = fields.integer("head_dim", MAX_WIDTH)
    d = read_trunk(
        fields,
        "deepseek_v4",
        head_dim,
        width="moe_intermediate_size",
        ropes=lambda _, positions: _ropes(fields, head_dim, positions),
    )
    if d.max_positions > MAX_SPARSE_POSITIONS:
        raise ConfigError(
            f"config.max_position_embeddings: expected at most {MAX_SPARSE_POSITIONS} with an indexer, got {d.max_positions}"
        )
    a = _read_attention(fields, d)
    s = Streams(
        fields.integer("hc_mult", MAX_STREAMS), fields.integer("hc_sinkhorn_iters", MAX_STEPS), fields.epsilon("hc_eps"), d.eps
    )
    if s.count * d.hidden > MAX_WIDTH:
        raise ConfigError(f"config.hc_mult: {s.count} streams of {d.hidden} elements exceed the maximum width of {MAX_WIDTH}")
    return _Decoder(d, a, s, _forward(fields, d))


def _current(fields: Fields) -> Fields:
    """The fields that Transformers' config object has. A published config.json has those of DeepSeek's own code."""
    layers, changes = fields.integer("num_hidden_layers", MAX_LAYERS), dict[str, Any]()
    if fields.get("layer_types") is None:
        ratios = fields.get("compress_ratios")
        if ratios is None:
            ratios = [128, 128, *(4 if layer % 2 else 128 for layer in range(layers - 2))]
        if not isinstance(ratios, (list, tuple)) or len(ratios) < layers:
            raise ConfigError(f"config.compress_ratios: expected a number for each of {layers} layers, got {shown(ratios)}")
        for ratio in ratios:
            if isinstance(ratio, bool) or ratio not in _RATIOS:
                raise UnsupportedModelError(f"config.compress_ratios: {shown(ratio)} is not supported. Supported: 0, 4, 128.")
        changes["layer_types"] = [_RATIOS[ratio] for ratio in ratios[:layers]]
    if fields.get("mlp_layer_types") is None:
        hashed = min(layers, fields.integer("num_hash_layers", MAX_LAYERS, low=0, default=3))
        changes["mlp_layer_types"] = ["hash_moe"] * hashed + ["moe"] * (layers - hashed)
    if fields.get("compress_rates") is None:
        rates = ((SPARSE, "compress_rate_csa", 4), (HEAVY, "compress_rate_hca", 128))
        changes["compress_rates"] = {kind: fields.get(name, default) for kind, name, default in rates}
    given = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if isinstance(given, dict) and not (isinstance(given.get("main"), dict) and isinstance(given.get("compress"), dict)):
        changes["rope_parameters"] = _nested(fields, given)
    return fields.with_(**changes) if changes else fields


def _nested(fields: Fields, given: dict[str, Any]) -> dict[str, Any]:
    """Parameters of RoPE by type, from one set of them, which applies to layers with entries."""
    share = fields.get("partial_rotary_factor")
    if share is None:
        share = fields.integer("qk_rope_head_dim", MAX_WIDTH) / fields.integer("head_dim", MAX_WIDTH)
    kind = given.get("rope_type", given.get("type", "default"))
    scaled = {name: value for name, value in given.items() if name != "type"}
    whole = {"attention_factor": 1.0} if kind == "yarn" else {}
    compress = {**whole, **scaled, "rope_type": kind, "rope_theta": fields.get("compress_rope_theta")}
    main = {"rope_type": "default", "rope_theta": fields.get("rope_theta")}
    return {name: {**part, "partial_rotary_factor": share} for name, part in (("main", main), ("compress", compress))}


def _ropes(fields: Fields, head_dim: int, positions: int) -> tuple[RopeSpec, ...]:
    """Those of layers without entries and with them, then the same backwards."""
    ropes = tuple(read_rope(fields, head_dim, positions, layer_type=kind, partial=64 / 512) for kind in ("main", "compress"))
    for rope in ropes:
        if rope.is_dynamic:
            raise ConfigError(f"config.rope_parameters['rope_type']: {rope.kind!r} is not supported in this family")
    return (*ropes, *(replace(rope, inv_freq=-rope.inv_freq) for rope in ropes))


def _read_attention(fields: Fields, d: Trunk) -> _Attention:
    heads, head_dim = fields.integer("num_attention_heads", MAX_HEADS), fields.integer("head_dim", MAX_WIDTH)
    groups, o_rank = fields.integer("o_groups", MAX_HEADS), fields.integer("o_lora_rank", MAX_WIDTH)
    for name in ("head_dim", "index_head_dim"):
        if fields.integer(name, MAX_WIDTH) % 2:
            raise ConfigError(f"config.{name}: expected an even number, got {fields.get(name)}")
    if heads * head_dim > MAX_WIDTH:
        raise ConfigError(f"config.head_dim: {heads} heads of {head_dim} elements exceed the maximum width of {MAX_WIDTH}")
    if heads * head_dim % groups or groups * o_rank > MAX_WIDTH:
        raise ConfigError(
            f"config.o_groups: {groups} groups of o_lora_rank {o_rank} do not fit {heads} heads of {head_dim} elements"
        )
    if d.ropes[MAIN].rot != d.ropes[COMPRESS].rot:
        raise ConfigError(
            f"config.rope_parameters: 'main' rotates {d.ropes[MAIN].rot} elements of a head and 'compress' "
            f"{d.ropes[COMPRESS].rot}, must be the same number"
        )
    kinds = read_layer_kinds(fields, d.layers, SLIDING, SPARSE, HEAVY)
    rates = fields.get("compress_rates")
    if not isinstance(rates, dict):
        raise ConfigError(f"config.compress_rates: expected a number of tokens for each type of layer, got {rates!r}")
    every = {}
    for kind in (SPARSE, HEAVY):
        if kind in kinds:
            every[kind] = Fields({f"compress_rates[{kind!r}]": rates.get(kind)}).integer(f"compress_rates[{kind!r}]", 1 << 16)
    index_heads, index = fields.integer("index_n_heads", MAX_HEADS), fields.integer("index_head_dim", MAX_WIDTH)
    if (SPARSE in kinds and index < d.rope.rot) or index_heads * index > MAX_WIDTH:
        raise ConfigError(
            f"config.index_head_dim: {index_heads} heads of {index} elements: expected at least the {d.rope.rot} rotated ones, "
            f"and {MAX_WIDTH} in all at most"
        )
    indexer = Indexer(index_heads, index, fields.integer("index_topk", MAX_WIDTH), interleaved=True)
    q_rank, window = fields.integer("q_lora_rank", MAX_WIDTH), fields.integer("sliding_window", MAX_POSITIONS)
    return _Attention(heads, head_dim, q_rank, window, groups, o_rank, kinds, every, indexer)


def _forward(fields: Fields, d: Trunk) -> FeedForward:
    scoring = fields.get("scoring_func")
    fields.only("scoring_func", "sqrtsoftplus", "sigmoid")
    kinds = fields.get("mlp_layer_types")
    if not isinstance(kinds, (list, tuple)) or len(kinds) != d.layers or any(kind not in ("hash_moe", "moe") for kind in kinds):
        raise ConfigError(f"config.mlp_layer_types: expected 'hash_moe' or 'moe' for each of {d.layers} layers, got {kinds!r}")
    routing = read_plain_routing(
        fields, d.hidden, experts="n_routed_experts", width="moe_intermediate_size", scoring=scoring,
        scale=fields.positive("routed_scaling_factor"), bias="gate.e_score_correction_bias", shared=d.intermediate,
        table="gate.tid2eid", by_table=tuple(kind == "hash_moe" for kind in kinds),
        clamped=ClampedForm(alpha=1.0, limit=fields.positive("swiglu_limit"), raised=False),
    )  # fmt: skip
    return feed_forward(d, routing, (True,) * d.layers)


def _tables(nodes: list[Node], d: Trunk, kinds: tuple[str, ...]) -> dict[int, Value]:
    """RoPE's tables for layers of these types: each has one for the rotation and one for that backwards."""
    tables = {}
    for i in sorted({int(kind != SLIDING) for kind in kinds}):
        for back in (0, 2):
            rope = d.ropes[i + back]
            tables[i + back] = emit(nodes, "rope_table", (), f"rope{i + back}", rope.rot, rope=rope)
    return tables


def _layer(
    nodes: list[Node], m: _Decoder, cache: _Cache, tables: dict[int, Value], streams: Value, layer: int
) -> Value:  # fmt: skip
    """The streams after a layer."""
    path = f"model.layers.{layer}"
    for block, hyper, norm_name in (("attn", "attn_hc", "input_layernorm"), ("mlp", "ffn_hc", "post_attention_layernorm")):
        name = f"l{layer}.{block}"
        weights = stream_weights(nodes, m.streams, streams, f"{name}_hc", _parameters(f"{path}.{hyper}"))
        x = collapse(nodes, m.streams, streams, weights, f"{name}_collapsed")
        x = norm(nodes, m.d, x, f"{name}_in", f"{path}.{norm_name}")
        y = _attend(nodes, m.d, m.attention, cache, tables, x, layer) if block == "attn" else m.forward(nodes, x, layer)
        streams = expand(nodes, m.streams, streams, weights, y, f"{name}_streams")
    return streams


def _results(nodes: list[Node], m: _Decoder, streams: Value, hyper: str, norm_path: str, head: str) -> None:
    """The states that the next MTP layer takes, the last hidden state and the logits."""
    nodes.append(Node("draft_out", (streams,)))
    weights = stream_weights(nodes, m.streams, streams, "head_hc", _parameters(hyper, "hc_"))
    normed = norm(nodes, m.d, collapse(nodes, m.streams, streams, weights, "collapsed"), "final", norm_path)
    nodes.append(Node("hidden_out", (normed,), attrs={"index": 0}))
    emit(nodes, "lm_head", (normed,), "logits", m.d.vocab, head, bias=None)


def _parameters(path: str, prefix: str = "") -> tuple[str, str, str]:
    return f"{path}.{prefix}fn", f"{path}.{prefix}base", f"{path}.{prefix}scale"


def _attend(nodes: list[Node], d: Trunk, a: _Attention, cache: _Cache, tables: dict[int, Value], x: Value, layer: int) -> Value:
    """Projections, RoPE, cache, attention, RoPE backwards, grouped output projection."""
    name, path, kind = f"l{layer}", f"model.layers.{layer}.self_attn", a.kinds[layer]
    table, back = (tables[int(kind != SLIDING) + way] for way in (0, 2))
    rotation = {"head_dim": a.head_dim, "offset": a.head_dim - table.width, "interleaved": True}
    down = linear(nodes, x, f"{name}.q_a", a.q_rank, f"{path}.q_a_proj")
    latent = rms_norm(nodes, down, f"{name}.q_latent", f"{path}.q_a_norm", d.eps)
    q = linear(nodes, latent, f"{name}.q", a.heads * a.head_dim, f"{path}.q_b_proj")
    q = emit(nodes, "head_norm", (q,), f"{name}.q_norm", q.width, eps=d.eps, heads=a.heads, head_dim=a.head_dim)
    q = emit(nodes, "rope", (q, table), f"{name}.q_rope", q.width, heads=a.heads, **rotation)
    row = linear(nodes, x, f"{name}.kv", a.head_dim, f"{path}.kv_proj")
    row = rms_norm(nodes, row, f"{name}.kv_norm", f"{path}.kv_norm", d.eps)
    row = emit(nodes, "rope", (row, table), f"{name}.kv_rope", row.width, heads=1, **rotation)
    place = cache.add(a.head_dim, window=a.window)
    nodes.append(Node("rows_write", (row,), attrs={"layer": place}))
    entries, every = -1, a.every.get(kind, 1)
    chosen: tuple[Value, ...] = ()
    if kind != SLIDING:
        module = f"{path}.compressor"
        entries = _compress(nodes, d, cache, x, f"{name}.comp", module, a.head_dim, every, kind == SPARSE)
    if kind == SPARSE:
        chosen = (_choose(nodes, d, a, cache, x, latent, table, f"{name}.index", f"{path}.compressor.indexer", every),)
    attended = emit(
        nodes, "compressed_attention", (q, *chosen), f"{name}.attn", q.width, f"{path}.sinks", layer=place, entries=entries,
        every=every, heads=a.heads, head_dim=a.head_dim, scale=a.head_dim**-0.5, window=a.window,
    )  # fmt: skip
    turned = emit(nodes, "rope", (attended, back), f"{name}.attn_back", q.width, heads=a.heads, **rotation)
    grouped = emit(
        nodes, "grouped_linear", (turned,), f"{name}.o_a", a.groups * a.o_rank, f"{path}.o_a_proj.weight", groups=a.groups
    )
    return linear(nodes, grouped, f"{name}.o", d.hidden, f"{path}.o_b_proj")


def _compress(
    nodes: list[Node], d: Trunk, cache: _Cache, x: Value, name: str, path: str, width: int, every: int, overlap: bool,
    rounded: bool = True,
) -> int:  # fmt: skip
    """What entries are computed from, and the entries; returns the kind of rows with these."""
    series = 2 if overlap else 1
    both = tuple(linear(nodes, x, f"{name}_{p}", series * width, f"{path}.{p}_proj") for p in ("kv", "gate"))
    rows = emit(nodes, "concat", both, f"{name}_rows", 2 * series * width)
    source = cache.add(rows.width, window=series * every, rounded=False)
    entries = cache.add(width, every=every, rounded=rounded)
    nodes.append(Node("rows_write", (rows,), attrs={"layer": source}))
    rope = d.ropes[COMPRESS]
    attrs = {"layer": entries, "source": source, "every": every, "overlap": overlap, "eps": d.eps, "rope": rope}
    weights = (f"{path}.position_bias", f"{path}.kv_norm.weight")
    nodes.append(Node("compress", weights=weights, attrs={**attrs, "offset": width - rope.rot}))
    return entries


def _choose(
    nodes: list[Node], d: Trunk, a: _Attention, cache: _Cache, x: Value, latent: Value, table: Value, name: str, path: str,
    every: int,
) -> Value:  # fmt: skip
    """The entries that each token attends to."""
    i = a.indexer
    keys = _compress(nodes, d, cache, x, name, path, i.width, every, overlap=True, rounded=False)
    q = linear(nodes, latent, f"{name}_q", i.heads * i.width, f"{path}.q_b_proj")
    q = emit(
        nodes, "rope", (q, table), f"{name}_q_rope", q.width, heads=i.heads, head_dim=i.width, offset=i.width - table.width,
        interleaved=True,
    )  # fmt: skip
    weights = linear(nodes, x, f"{name}_w", i.heads, f"{path}.scorer.weights_proj")
    return emit(
        nodes, "entries_choose", (q, weights), f"{name}_chosen", i.top_k, layer=keys, every=every, heads=i.heads,
        head_dim=i.width, top_k=i.top_k, scale=(i.width * i.heads) ** -0.5,
    )  # fmt: skip
