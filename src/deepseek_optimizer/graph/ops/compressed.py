"""Compressed attention (DeepSeek-V4): a window of the last tokens, and entries that several tokens are compressed to.

The cache has rows of several kinds (`RowsSpec`). Entry e of a layer is computed from the tokens [e * every, (e + 1) * every),
and from its last token on it is visible. Source: DeepSeek-V4 (2026), section 2.3; `DeepseekV4Attention` of Transformers.
"""

from __future__ import annotations

from ..ir import Graph, Node
from .spec import BOOL, FLOAT, INT, ROPE, Attr, Operand, OpSpec, Shapes, step_attr
from .widths import cached_rows

_LAYER = step_attr("layer", INT, "kind of rows in the cache")
_EVERY = Attr("every", INT, "tokens of an entry", step_field="groups")
_HEADS, _HEAD_DIM = step_attr("heads", INT), step_attr("head_dim", INT)
_SCALE = step_attr("scale", FLOAT)
_ENTRIES = Attr("entries", INT, "kind of rows with the entries", step_field="index")


def _write_fits(node: Node, graph: Graph) -> bool:
    rows = cached_rows(graph, node.attrs["layer"])
    return rows is not None and rows.every == 1 and rows.width == node.inputs[0].width


def _compress_fits(node: Node, graph: Graph) -> bool:
    a = node.attrs
    rows, entries = cached_rows(graph, a["source"]), cached_rows(graph, a["layer"])
    if rows is None or entries is None or rows.every != 1:
        return False
    series = 2 if a["overlap"] else 1
    widths = rows.width == 2 * series * entries.width and a["offset"] + a["rope"].rot <= entries.width
    read = rows.window in (0, series * a["every"])
    return bool(widths and read and entries.every == a["every"] and not entries.window and a["offset"] >= 0)


def _compress_shapes(node: Node, graph: Graph) -> Shapes:
    entries = cached_rows(graph, node.attrs["layer"])
    assert entries is not None
    series = 2 if node.attrs["overlap"] else 1
    bias, norm = node.weights
    return [(bias, (node.attrs["every"], series * entries.width)), (norm, (entries.width,))]


def _choose_fits(node: Node, graph: Graph) -> bool:
    a, keys = node.attrs, cached_rows(graph, node.attrs["layer"])
    (q, w), chosen = (v.width for v in node.inputs), node.outputs[0].width
    shape = (q, w, chosen) == (a["heads"] * a["head_dim"], a["heads"], a["top_k"])
    return shape and keys is not None and (keys.width, keys.every) == (a["head_dim"], a["every"])


def _attention_fits(node: Node, graph: Graph) -> bool:
    a, (q, *chosen) = node.attrs, node.inputs
    rows = cached_rows(graph, a["layer"])
    if rows is None or (rows.width, rows.every) != (a["head_dim"], 1) or a["window"] < 1 or rows.window != a["window"]:
        return False
    if a["entries"] >= 0:
        entries = cached_rows(graph, a["entries"])
        if entries is None or (entries.width, entries.every) != (a["head_dim"], a["every"]):
            return False
    elif chosen:
        return False
    return bool(q.width == node.outputs[0].width == a["heads"] * a["head_dim"])


def _grouped_fits(node: Node, _: Graph) -> bool:
    groups, x, y = node.attrs["groups"], node.inputs[0].width, node.outputs[0].width
    return bool(groups >= 1 and x % groups == 0 and y % groups == 0)


def _grouped_shapes(node: Node, _: Graph) -> Shapes:
    groups, x, y = node.attrs["groups"], node.inputs[0].width, node.outputs[0].width
    return [(node.weights[0], (y // groups if node.attrs.get("shared", False) else y, x // groups))]


SPECS = (
    OpSpec(
        name="rows_write",
        inputs=(Operand("x", "[T, N]"),),
        attrs=(_LAYER,),
        fits=_write_fits,
        writes="rows",
        rows="tokens",
        code=51,
        doc="Stores the rows of the step's tokens in the cache.",
    ),
    OpSpec(
        name="compress",
        weights=(Operand("b", "[every, N] or, with overlap, [every, 2 N]"), Operand("w", "[N]")),
        attrs=(
            step_attr("layer", INT, "kind of rows with the entries"),
            Attr("source", INT, "kind of rows that are compressed", step_field="index"),
            _EVERY,
            Attr("overlap", BOOL, "an entry is also computed from the tokens before its own", flag="overlap"),
            step_attr("eps", FLOAT, "of the norm"),
            Attr("rope", ROPE, "frequencies and scaling"),
            step_attr("offset", INT, "first rotated element"),
        ),
        fits=_compress_fits,
        weight_shapes=_compress_shapes,
        reads="rows",
        read_layers=("source",),
        writes="rows",
        rows="tokens",
        code=52,
        doc="""
            Computes the entries whose last token is in the step, from the rows of their tokens in the cache, and stores them.
            The row of token t is [c_t, z_t], and m stands for `every`. Element by element:

                entry e = sum over the tokens t of e of softmax over t (z_t + b_(t % m)) c_t

            With `overlap`, a row is [c', c, z', z], b is [b', b], and the sum and softmax also run over the m tokens before
            those of entry e, from which they read c' and z' + b'; entry 0 has none before it. The sum is normalized by
            `rms_norm` with w, and the pairs (2i, 2i + 1) of its elements from `offset` on are rotated as by `rope` at position
            e * m.
        """,
    ),
    OpSpec(
        name="entries_choose",
        inputs=(Operand("q", "[T, heads * head_dim]"), Operand("w", "[T, heads]")),
        outputs=(Operand("chosen", "[T, top_k]"),),
        attrs=(_LAYER, _EVERY, _HEADS, _HEAD_DIM, step_attr("top_k", INT), _SCALE),
        fits=_choose_fits,
        reads="rows",
        rows="tokens",
        code=53,
        doc="""
            `index_choose` among the entries that a row sees, by their keys k_e in the cache: the top_k entries with the highest
            score, or all if there are at most top_k.

                score(e) = scale * sum over h of w_h * relu(q_h . k_e)

            `chosen` holds numbers of entries, ascending, as floats, padded with -1.
        """,
    ),
    OpSpec(
        name="compressed_attention",
        inputs=(Operand("q", "[T, heads * head_dim]"), Operand("chosen", "[T, top_k]", optional=True)),
        outputs=(Operand("o", "[T, heads * head_dim]"),),
        weights=(Operand("sink", "[heads]"),),
        attrs=(_LAYER, _ENTRIES, _EVERY, _HEADS, _HEAD_DIM, _SCALE, step_attr("window", INT)),
        fits=_attention_fits,
        weight_shapes=lambda n, g: [(n.weights[0], (n.attrs["heads"],))],
        reads="rows",
        read_layers=("layer", "entries"),
        rows="tokens",
        code=54,
        kernels="tasks of 16 heads and chunks of 256 rows of the cache, whose partial results are merged in order.",
        doc="""
            `attention` of all heads over the same rows r of the cache, which are both keys and values, with a further logit per
            head in the softmax's denominator:

                o_h = sum over r of softmax(scale * q_h . r, sink_h) r

            Token i of a sequence sees the rows of the tokens j with i - window < j <= i, and, unless `entries` is -1, the
            entries e < (i + 1) // every, or only those in `chosen`.
        """,
    ),
    OpSpec(
        name="grouped_linear",
        inputs=(Operand("x", "[T, groups * K]"),),
        outputs=(Operand("y", "[T, groups * N]"),),
        weights=(Operand("W", "[groups * N, K], or with `shared` [N, K]"),),
        attrs=(step_attr("groups", INT), Attr("shared", BOOL, "whether all groups have the same matrix", False, flag="shared")),
        fits=_grouped_fits,
        weight_shapes=_grouped_shapes,
        code=55,
        doc="""
            y_g = W_g x_g for each group g of consecutive elements of x and rows of W; with `shared`, y_g = W x_g. The latter is
            a product of each residual stream of a token.
        """,
    ),
)
