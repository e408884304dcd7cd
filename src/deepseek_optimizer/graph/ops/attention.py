"""Attention over a cache of keys and values, and the choice of blocks for sparse attention."""

from __future__ import annotations

from ..ir import Graph, Node
from .spec import BOOL, FLOAT, INT, Attr, Operand, OpSpec, one_of, step_attr
from .widths import fits_cache, fits_choice, fits_span, heads_width

_LAYER = step_attr("layer", INT)
_KV = (_LAYER, step_attr("kv_heads", INT), step_attr("head_dim", INT))
_HEADS = (_LAYER, step_attr("heads", INT), *_KV[1:])
_INTERLEAVED = Attr("interleaved", BOOL, "pairs of RoPE are (2i, 2i + 1); otherwise (i, i + rot/2)", flag="interleaved")
_Q, _TABLE = Operand("q", "[T, heads * head_dim]"), Operand("table", "[T, rot]")
_K, _V = Operand("k", "[T, kv_heads * head_dim]"), Operand("v", "[T, kv_heads * head_dim]")
CHOICE = (
    Attr("blocks", INT, "maximum number of blocks that a row attends to", step_field="top_k"),
    step_attr("sinks", INT, "first tokens that are always visible"),
    step_attr("window", INT, "last tokens that are always visible"),
)


def _cache_write_fits(node: Node, graph: Graph) -> bool:
    return all(v.width == heads_width(node, "kv_heads") for v in node.inputs) and fits_cache(node, graph)


def _rope_cache_fits(node: Node, graph: Graph) -> bool:
    q, k, v, table = (value.width for value in node.inputs)
    heads = q == node.outputs[0].width == heads_width(node, "heads") and k == v == heads_width(node, "kv_heads")
    return bool(heads and table <= node.attrs["head_dim"] and fits_cache(node, graph))


def _attention_fits(node: Node, graph: Graph) -> bool:
    a, (q, *chosen) = node.attrs, node.inputs
    heads = q.width == node.outputs[0].width == heads_width(node, "heads") and a["heads"] % a["kv_heads"] == 0
    by_blocks = all(c.width % a["kv_heads"] == 0 for c in chosen)
    limited = bool(chosen or a.get("sinks", 0))
    chunks = not a.get("chunked", False) or (a["window"] > 0 and not limited)
    eager = limited and a["softmax"] == "eager"
    return heads and by_blocks and chunks and not eager and fits_span(node) and fits_cache(node, graph)


def _block_choose_fits(node: Node, graph: Graph) -> bool:
    a = node.attrs
    widths = node.inputs[0].width, node.outputs[0].width
    heads = widths == (heads_width(node, "heads"), a["kv_heads"] * a["blocks"]) and a["heads"] % a["kv_heads"] == 0
    return heads and fits_choice(node, graph) and fits_cache(node, graph)


SPECS = (
    OpSpec(
        name="cache_write",
        inputs=(_K, _V),
        attrs=_KV,
        fits=_cache_write_fits,
        writes="cache",
        rows="tokens",
        code=9,
        doc="Stores the keys and values of the step's tokens in the layer's cache.",
    ),
    OpSpec(
        name="rope_cache",
        origin="rule",
        inputs=(_Q, _K, _V, _TABLE),
        outputs=(Operand("y", "[T, heads * head_dim]"),),
        attrs=(*_HEADS, _INTERLEAVED),
        fits=_rope_cache_fits,
        writes="cache",
        rows="tokens",
        in_place=((0, 0),),
        code=10,
        doc="y = `rope`(q); `cache_write`(`rope`(k), v). Created by rule `rope_cache`.",
    ),
    OpSpec(
        name="attention",
        inputs=(_Q, Operand("chosen", "[T, kv_heads * blocks]", optional=True)),
        outputs=(Operand("o", "[T, heads * head_dim]"),),
        weights=(Operand("sink", "[heads]", optional=True),),
        attrs=(
            *_HEADS,
            step_attr("scale", FLOAT),
            step_attr("window", INT, "0: all tokens up to the row's own are visible"),
            Attr("softmax", one_of("eager", "online"), "how the softmax is computed", flag="eager", flag_value="eager"),
            step_attr("sinks", INT, "with a window, first tokens that stay visible", 0),
            step_attr("softcap", FLOAT, "limit of the scores; 0: none", 0.0),
            Attr("chunked", BOOL, "the window is a chunk at a fixed place", False, flag="chunked"),
            Attr("causal", BOOL, "rows never see later tokens", False, flag="causal"),
        ),
        fits=_attention_fits,
        weight_shapes=lambda n, g: [(name, (n.attrs["heads"],)) for name in n.weights],
        reads="cache",
        rows="tokens",
        any_kind=0,
        code=11,
        kernels="decode: chunks of 256 tokens, whose partial results are merged in order; prefill: tiles of 32 query rows.",
        doc="""
            For each query head h, with the keys K and values V of its kv head, h // (heads / kv_heads), over the visible
            tokens:

                o_h = softmax(scale * q_h K^T) V

            A row that is token i of its sequence attends to the tokens j <= i; with a window, only to those with i - j < window
            or j < sinks; with `chunked`, to those with j // window = i // window, the tokens of its own chunk (Llama 4); with
            `chosen`, only to those in the chosen blocks. `softmax` is "eager" (a whole row of scores at
            once) or "online" (blocks of 32 tokens with a running maximum and sum; Milakov and Gimelshein 2018, Dao et al.
            2022).

            A step may let rows see tokens after their own (`StepBatch.visible_to`): in Gemma 3, all tokens of a picture see
            each other, as far as the window reaches. With `causal` they do not (full layers of Gemma 4).

            With a `softcap` c, c * tanh(s / c) replaces a score s before the softmax. `sink` holds a further logit per head,
            which counts in the softmax's denominator only.

            Source: Vaswani et al. 2017; grouped heads: Ainslie et al. 2023; sinks: Xiao et al. 2023; softcap: Gemma Team 2024;
            `sink`: OpenAI 2025 (gpt-oss).
        """,
    ),
    OpSpec(
        name="block_choose",
        origin="rule",
        inputs=(_Q,),
        outputs=(Operand("chosen", "[T, kv_heads * blocks]"),),
        attrs=(*_HEADS, *CHOICE),
        fits=_block_choose_fits,
        reads="cache",
        rows="tokens",
        code=29,
        doc="""
            Chooses the blocks of 32 tokens that each row and kv head attends to. Up to token i there are the blocks [0, n), n =
            i // 32 + 1. If n <= blocks, all of them are chosen. Otherwise, the blocks of the sinks, [0, S), S = ceil(sinks /
            32), and those of the window, [W, n), W = max(0, i + 1 - window) // 32, are chosen, and of the blocks B between them
            those with the highest score, up to `blocks` in total. If scores are equal, the earlier block is chosen.

                e_h(b)   = sum over d of max(q_hd * max_d(b), q_hd * min_d(b))
                score(b) = max over the heads h of the kv head of (e_h(b) - max over b' in B of e_h(b'))

            max_d(b) and min_d(b) are the largest and smallest element d of the 32 keys of block b as the cache stores them,
            rounded to bf16 unless the cache is fp32 (the block's "summaries"), so e_h(b) is an upper bound of the logits of
            head h in the block. `chosen` holds block numbers within the sequence, ascending, as floats, padded with -1, kv head
            after kv head. Attention mode "sparse" inserts this op (`graph/attention_mode.py`).

            Source: Tang et al. 2024 (Quest).
        """,
    ),
)
