"""Multi-head latent attention (MLA) over a latent cache, and the lightning indexer.

Dimensions: a head of q has `nope` elements without position, then `rope` rotated ones. A row of the cache is a latent of `rank`
elements, then a rotated key of `rope` elements that all heads share. kv_b is [heads * (nope + v_dim), rank]: the rows of head h
are its `nope` key rows, then its `v_dim` value rows.
"""

from __future__ import annotations

from ..ir import BLOCK, Graph, LatentSpec, Node
from .attention import CHOICE
from .spec import BOOL, FLOAT, INT, Attr, Operand, OpSpec, Shapes, one_of, step_attr
from .widths import fits_choice, fits_latent_cache, fits_span, latent_cache

_LAYER, _SCALE = step_attr("layer", INT), step_attr("scale", FLOAT)
_MLA = (_LAYER, step_attr("heads", INT), step_attr("nope", INT), Attr("rope", INT), Attr("rank", INT), step_attr("v_dim", INT))
_FORM = Attr("form", one_of("expanded", "absorbed"), "how scores are computed", flag="expand", flag_value="expanded")
_WINDOW = (
    step_attr("window", INT, "0: all tokens up to the row's own are visible", 0),
    step_attr("sinks", INT, "with a window, first tokens that stay visible", 0),
)
_TOP_K = step_attr("top_k", INT, "set by lowering: width of `chosen`, 0 without it", 0)
_LOWERED = (*_MLA, _FORM, _TOP_K, *_WINDOW)
_ADAPTERS = (
    Attr(
        "site", INT, "index of its keys in `Graph.adapter_sites`, where its values follow; -1: adapters do not change kv_b", -1
    ),
    Attr("lora_rank", INT, "with a site, largest rank of an adapter", 0),
)
_Q, _KV_B = Operand("q", "[T, heads * (nope + rope)]"), Operand("kv_b", "[heads * (nope + v_dim), rank]")
_C = Operand("c", "[T, rank + rope]")
_ABSORBED = Operand("absorbed", "[T, heads * (rank + rope)]")
_SUMS, _EXPANDED = Operand("sums", "[T, heads * rank]"), Operand("expanded", "[T, heads * v_dim]")


def _kv_b_shape(node: Node, _: Graph) -> Shapes:
    a = node.attrs
    return [(node.weights[0], (a["heads"] * (a["nope"] + a["v_dim"]), a["rank"]))]


def _query_width(node: Node) -> int:
    return int(node.attrs["heads"] * (node.attrs["nope"] + node.attrs["rope"]))


def _latent_fits(node: Node, graph: Graph) -> bool:
    spec, (x, table), y = graph.cache, (v.width for v in node.inputs), node.outputs[0].width
    fits = isinstance(spec, LatentSpec) and (node.attrs["rank"], table) == (spec.rank, spec.rope)
    return bool(fits and x == y == node.attrs["rank"] + table)


def _latent_write_fits(node: Node, graph: Graph) -> bool:
    spec = latent_cache(node, graph)
    return spec is not None and node.inputs[0].width == spec.rank + spec.rope


def _mla_attention_fits(node: Node, graph: Graph) -> bool:
    widths = node.inputs[0].width, node.outputs[0].width
    fits = widths == (_query_width(node), node.attrs["heads"] * node.attrs["v_dim"])
    return fits_latent_cache(node, graph) and fits and fits_span(node)


def _latent_choose_fits(node: Node, graph: Graph) -> bool:
    widths = node.inputs[0].width, node.outputs[0].width
    fits = widths == (_query_width(node), BLOCK * node.attrs["blocks"])
    return fits_latent_cache(node, graph) and fits and fits_choice(node, graph)


def _index_write_fits(node: Node, graph: Graph) -> bool:
    spec = latent_cache(node, graph)
    return spec is not None and node.inputs[0].width == spec.index > 0


def _index_choose_fits(node: Node, graph: Graph) -> bool:
    a, spec = node.attrs, latent_cache(node, graph)
    (q, w), chosen = (v.width for v in node.inputs), node.outputs[0].width
    return spec is not None and a["index"] == spec.index and (q, w, chosen) == (a["heads"] * a["index"], a["heads"], a["top_k"])


def _mla_absorb_fits(node: Node, _: Graph) -> bool:
    a = node.attrs
    widths = node.inputs[0].width, node.outputs[0].width
    return widths == (_query_width(node), a["heads"] * (a["rank"] + a["rope"]))


def _mla_value_fits(node: Node, _: Graph) -> bool:
    a, widths = node.attrs, [v.width for v in (*node.inputs, *node.outputs)]
    return widths == [a["heads"] * a["rank"], a["heads"] * a["v_dim"], a["heads"] * a["v_dim"]]


SPECS = (
    OpSpec(
        name="latent",
        inputs=(Operand("kv_a", "[T, rank + rope]"), Operand("table", "[T, rope]")),
        outputs=(_C,),
        weights=(Operand("w", "[rank]"),),
        attrs=(
            step_attr("eps", FLOAT),
            Attr("rank", INT),
            Attr("interleaved", BOOL, "pairs of RoPE are (2i, 2i + 1); otherwise (i, i + rope/2)", flag="interleaved"),
        ),
        fits=_latent_fits,
        weight_shapes=lambda n, g: [(n.weights[0], (n.attrs["rank"],))],
        rows="tokens",
        in_place=((0, 0),),
        code=19,
        doc="""
            c = `rms_norm` of the first `rank` elements of kv_a, then `rope` of the others: the latent and the rotated key.
            Source: DeepSeek-V2, section 2.1.
        """,
    ),
    OpSpec(
        name="latent_write",
        inputs=(_C,),
        attrs=(_LAYER,),
        fits=_latent_write_fits,
        writes="latents",
        rows="tokens",
        code=20,
        doc="Stores the latents and rotated keys of the step's tokens in the layer's cache.",
    ),
    OpSpec(
        name="mla_attention",
        inputs=(_Q, Operand("chosen", "[T, top_k]", optional=True)),
        outputs=(Operand("o", "[T, heads * v_dim]"),),
        weights=(_KV_B,),
        attrs=(*_MLA, _SCALE, _FORM, *_WINDOW, _TOP_K, *_ADAPTERS),
        fits=_mla_attention_fits,
        weight_shapes=_kv_b_shape,
        reads="latents",
        rows="tokens",
        code=22,
        kernels="decode: absorbed, chunks of 256 tokens and 16 heads; prefill: the cheaper form, for each sequence.",
        doc="""
            For each head h over the visible tokens, where a cached row is the latent c and the rotated key r, and K_h and V_h
            are the key rows and value rows of head h in kv_b:

                o_h = softmax(scale * (q_h^nope . (K_h c) + q_h^rope . r)) (V_h c)

            Form "expanded" computes K_h c and V_h c of every cached token, as Transformers does. Form "absorbed" computes
            neither:

                q_h^nope . (K_h c) = (K_h^T q_h^nope) . c        sum of w_t (V_h c_t) = V_h (sum of w_t c_t)

            In phase PREFILL, a backend may expand if that is cheaper. `chosen` holds token numbers within the row's sequence,
            ascending, as floats, padded with -1; the row attends to no others. Window and sinks: as in `attention`. Lowering
            splits the absorbed form into `mla_absorb`, `mla_attention` with other operands (q, absorbed, chosen -> sums,
            expanded), and `mla_value`; with a site also into `lora_down` and `lora_up` of every head. Sequences whose adapter
            changes kv_b are never expanded.

            Source: DeepSeek-V2, section 2.1.
        """,
    ),
    OpSpec(
        name="latent_choose",
        origin="rule",
        inputs=(_Q,),
        outputs=(Operand("chosen", "[T, 32 * blocks]"),),
        weights=(_KV_B,),
        attrs=(*_MLA, *CHOICE, *_ADAPTERS),
        fits=_latent_choose_fits,
        weight_shapes=_kv_b_shape,
        reads="latents",
        rows="tokens",
        code=30,
        doc="""
            `block_choose` for latent attention: queries are absorbed (see `mla_absorb`), a key is a whole row of the cache, and
            all heads share one choice. `chosen` holds the tokens up to the row's own in the chosen blocks, for `mla_attention`.
            Attention mode "sparse" inserts this op; lowering computes the absorbed queries by `mla_absorb`.
        """,
    ),
    OpSpec(
        name="index_write",
        inputs=(Operand("k", "[T, index]"),),
        attrs=(_LAYER,),
        fits=_index_write_fits,
        writes="index keys",
        rows="tokens",
        code=25,
        doc="Stores the lightning indexer's keys of the step's tokens in the layer's cache.",
    ),
    OpSpec(
        name="index_choose",
        inputs=(Operand("q", "[T, heads * index]"), Operand("w", "[T, heads]")),
        outputs=(Operand("chosen", "[T, top_k]"),),
        attrs=(_LAYER, step_attr("heads", INT), step_attr("index", INT), step_attr("top_k", INT), _SCALE),
        fits=_index_choose_fits,
        reads="index keys",
        rows="tokens",
        code=26,
        doc="""
            The lightning indexer: chooses the top_k visible tokens t with the highest score, or all if there are at most top_k.
            If scores are equal, the earlier token is chosen. `chosen` is as in `mla_attention`.

                score(t) = scale * sum over h of w_h * relu(q_h . k_t)

            Source: DeepSeek-V3.2, section 2.1.
        """,
    ),
    OpSpec(
        name="mla_absorb",
        origin="lowering",
        inputs=(_Q,),
        outputs=(_ABSORBED,),
        weights=(Operand("keys", "heads x [rank, nope]"),),
        attrs=_LOWERED,
        fits=_mla_absorb_fits,
        code=21,
        doc="absorbed_h = K_h^T q_h^nope, then q_h^rope. Rows that `mla_attention` will expand are left out.",
    ),
    OpSpec(
        name="mla_value",
        origin="lowering",
        inputs=(_SUMS, _EXPANDED),
        outputs=(Operand("o", "[T, heads * v_dim]"),),
        weights=(Operand("values", "heads x [v_dim, rank]"),),
        attrs=(*_LOWERED, _SCALE),
        fits=_mla_value_fits,
        any_kind=0,
        code=23,
        doc="o_h = V_h sums_h for absorbed rows; the others are copied from `expanded`.",
    ),
)
