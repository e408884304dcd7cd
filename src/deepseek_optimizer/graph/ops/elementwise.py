"""Ops that treat each row separately: norms, sums, activations, copies."""

from __future__ import annotations

from ..ir import Graph, Node
from .spec import BOOL, FLOAT, INT, ROPE, Attr, Operand, OpSpec, Shapes, step_attr
from .widths import heads_width, same_widths

_X, _Y = Operand("x", "[T, N]"), Operand("y", "[T, N]")
_EPS = step_attr("eps", FLOAT, "added to the mean square or variance")
_OFFSET = Attr("unit_offset", BOOL, "the factor is 1 + w instead of w", False)


def _vectors(node: Node, _: Graph) -> Shapes:
    return [(name, (node.inputs[0].width,)) for name in node.weights]


def _columns_fit(node: Node, _: Graph) -> bool:
    a, x, y = node.attrs, node.inputs[0].width, node.outputs[0].width
    if a["groups"] < 1 or x % a["groups"]:
        return False
    return bool(0 <= a["begin"] < a["end"] <= x // a["groups"] and y == a["groups"] * (a["end"] - a["begin"]))


def _rope_fits(node: Node, _: Graph) -> bool:
    x, table, y = node.inputs[0].width, node.inputs[1].width, node.outputs[0].width
    return bool(x == y == heads_width(node, "heads") and table + node.attrs.get("offset", 0) <= node.attrs["head_dim"])


SPECS = (
    OpSpec(
        name="rms_norm",
        inputs=(_X,),
        outputs=(_Y,),
        weights=(Operand("w", "[N]"),),
        attrs=(_EPS, _OFFSET),
        fits=same_widths,
        weight_shapes=_vectors,
        any_kind=0,
        code=2,
        doc="""
            y = x / sqrt(mean(x^2) + eps) * w, over each row. Gemma stores w - 1. Source: Zhang and Sennrich 2019.
        """,
    ),
    OpSpec(
        name="head_norm",
        inputs=(Operand("x", "[T, heads * head_dim]"),),
        outputs=(Operand("y", "[T, heads * head_dim]"),),
        weights=(Operand("w", "[head_dim]", optional=True),),
        attrs=(_EPS, _OFFSET, step_attr("heads", INT), step_attr("head_dim", INT)),
        fits=lambda n, g: same_widths(n, g) and n.inputs[0].width == heads_width(n, "heads"),
        weight_shapes=lambda n, g: [(name, (n.attrs["head_dim"],)) for name in n.weights],
        code=2,
        doc="""
            `rms_norm` of each head separately, with the same weight for all heads (the query and key norm of Qwen3). Without a
            weight the factor is 1 (Llama 4's query and key norm, Gemma 4's value norm).
        """,
    ),
    OpSpec(
        name="layer_norm",
        inputs=(_X,),
        outputs=(_Y,),
        weights=(Operand("w", "[N]"), Operand("b", "[N]", optional=True)),
        attrs=(_EPS,),
        fits=same_widths,
        weight_shapes=_vectors,
        any_kind=0,
        code=24,
        doc="""
            y = (x - mean(x)) / sqrt(var(x) + eps) * w + b, over each row; var is the biased variance. Source: Ba et al. 2016.
        """,
    ),
    OpSpec(
        name="add",
        inputs=(_X, Operand("y", "[T, N]")),
        outputs=(Operand("z", "[T, N]"),),
        fits=same_widths,
        in_place=((0, 0), (0, 1)),
        code=3,
        doc="z = x + y.",
    ),
    OpSpec(
        name="add_features",
        inputs=(_X,),
        outputs=(_Y,),
        attrs=(Attr("index", INT, "of this node among those of the graph", step_field="layer"),),
        fits=same_widths,
        rows="tokens",
        in_place=((0, 0),),
        code=56,
        doc="""
            y = x + the features of index `index` of each row (`StepBatch.features`); x without any. Qwen3-VL's language model
            adds features of pictures to its first layers' results in this way. Source: Meng et al. 2024 (DeepStack).
        """,
    ),
    OpSpec(
        name="add_rms_norm",
        origin="rule",
        inputs=(_X, Operand("delta", "[T, N]")),
        outputs=(Operand("z", "[T, N]"), _Y),
        weights=(Operand("w", "[N]"),),
        attrs=(_EPS, _OFFSET),
        fits=same_widths,
        weight_shapes=_vectors,
        in_place=((0, 0),),
        any_kind=1,
        code=4,
        doc="z = x + delta; y = `rms_norm`(z). Created by rule `layer_norm`.",
    ),
    OpSpec(
        name="swiglu",
        inputs=(Operand("gate", "[T, N]"), Operand("up", "[T, N]")),
        outputs=(Operand("h", "[T, N]"),),
        fits=same_widths,
        any_kind=0,
        code=12,
        doc="h = silu(gate) * up, where silu(x) = x / (1 + e^-x). Source: Shazeer 2020.",
    ),
    OpSpec(
        name="clamped_swiglu",
        inputs=(Operand("gate", "[T, N]"), Operand("up", "[T, N]")),
        outputs=(Operand("h", "[T, N]"),),
        attrs=(Attr("limit", FLOAT, "L", step_field="scale"),),
        fits=same_widths,
        any_kind=0,
        code=46,
        doc="h = silu(min(gate, L)) * u, where u is up limited to [-L, L]. Source: `DeepseekV4MLP` of Transformers.",
    ),
    OpSpec(
        name="geglu",
        inputs=(Operand("gate", "[T, N]"), Operand("up", "[T, N]")),
        outputs=(Operand("h", "[T, N]"),),
        fits=same_widths,
        any_kind=0,
        code=31,
        doc="h = `gelu`(gate) * up. Source: Shazeer 2020.",
    ),
    OpSpec(
        name="gelu",
        inputs=(_X,),
        outputs=(_Y,),
        fits=same_widths,
        in_place=((0, 0),),
        any_kind=0,
        code=32,
        doc="""
            y = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), the approximation that Transformers calls
            "gelu_pytorch_tanh". Source: Hendrycks and Gimpel 2016.
        """,
    ),
    OpSpec(
        name="gelu_erf",
        inputs=(_X,),
        outputs=(_Y,),
        fits=same_widths,
        in_place=((0, 0),),
        any_kind=0,
        code=42,
        doc='y = x / 2 * (1 + erf(x / sqrt(2))), Transformers\' "gelu". Source: Hendrycks and Gimpel 2016.',
    ),
    OpSpec(
        name="relu",
        inputs=(_X,),
        outputs=(_Y,),
        fits=same_widths,
        in_place=((0, 0),),
        any_kind=0,
        code=58,
        doc="y = max(x, 0). Source: Nair and Hinton 2010.",
    ),
    OpSpec(
        name="scale",
        inputs=(_X,),
        outputs=(_Y,),
        attrs=(step_attr("scale", FLOAT),),
        fits=same_widths,
        in_place=((0, 0),),
        any_kind=0,
        code=33,
        doc="y = scale * x.",
    ),
    OpSpec(
        name="scale_by",
        inputs=(_X,),
        outputs=(_Y,),
        weights=(Operand("w", "[1]"),),
        fits=same_widths,
        weight_shapes=lambda n, g: [(n.weights[0], (1,))],
        in_place=((0, 0),),
        doc="y = w * x, with a factor that is a parameter (Gemma 4's layer scalar). Lowering turns the op into `scale`.",
    ),
    OpSpec(
        name="clamp",
        inputs=(_X,),
        outputs=(_Y,),
        weights=(Operand("low", "[]"), Operand("high", "[]")),
        fits=same_widths,
        weight_shapes=lambda n, g: [(name, ()) for name in n.weights],
        in_place=((0, 0),),
        any_kind=0,
        code=62,
        doc="y = min(max(x, low), high), with limits that are parameters (Gemma 4's clipped products).",
    ),
    OpSpec(
        name="multiply",
        inputs=(_X, Operand("y", "[T, N]")),
        outputs=(Operand("z", "[T, N]"),),
        fits=same_widths,
        in_place=((0, 0), (0, 1)),
        any_kind=0,
        code=37,
        doc="z = x * y, element by element.",
    ),
    OpSpec(
        name="columns",
        inputs=(_X,),
        outputs=(Operand("y", "[T, groups * (end - begin)]"),),
        attrs=(
            step_attr("groups", INT, "equal parts of a row"),
            Attr("begin", INT, "first element, in each part", step_field="offset"),
            Attr("end", INT, "one past the last element, in each part"),
        ),
        fits=_columns_fit,
        any_kind=0,
        code=38,
        doc="""
            y = elements [begin, end) of each of the `groups` parts of a row: one result of a product whose matrix has the rows
            of several results head by head (Qwen3-Next). Lowering divides the product with a matrix of several parts this way.
        """,
    ),
    OpSpec(
        name="sigmoid_gate",
        inputs=(_X, Operand("gate", "[T, N] or [T, 1]")),
        outputs=(_Y,),
        fits=lambda n, g: n.inputs[0].width == n.outputs[0].width and n.inputs[1].width in (1, n.inputs[0].width),
        in_place=((0, 0),),
        any_kind=0,
        code=36,
        doc="y = x / (1 + e^-gate), element by element or with one gate per row (the shared expert of Qwen2-MoE).",
    ),
    OpSpec(
        name="softcap",
        origin="lowering",
        inputs=(_X,),
        outputs=(_Y,),
        attrs=(step_attr("scale", FLOAT, "the limit"),),
        fits=same_widths,
        in_place=((0, 0),),
        any_kind=0,
        code=34,
        doc="y = scale * tanh(x / scale). Lowering puts it behind a head with `softcap`.",
    ),
    OpSpec(
        name="concat",
        inputs=(Operand("x", "[T, N]"), Operand("y", "[T, M]")),
        outputs=(Operand("z", "[T, N + M]"),),
        fits=lambda n, g: sum(v.width for v in n.inputs) == n.outputs[0].width,
        any_kind=0,
        code=28,
        doc="""
            Each row of z contains the elements of x, then those of y. MTP layers concatenate an embedding and a hidden state in
            this way (DeepSeek-V3, section 2.2).
        """,
    ),
    OpSpec(
        name="rope_table",
        outputs=(Operand("table", "[T, rot]"),),
        attrs=(Attr("rope", ROPE, "frequencies and scaling"),),
        fits=lambda n, g: n.outputs[0].width == n.attrs["rope"].rot,
        rows="tokens",
        code=7,
        doc="""
            For the position p of each row, with cosines and sines rounded from double:

                a_i   = p * inv_freq_i in fp32, for i in [0, rot / 2)
                table = rope.scaling * [cos a_0, cos a_1, ..., sin a_0, sin a_1, ...]

            With axes (`rope.axes`; Qwen2-VL's M-RoPE), the rows of pictures have positions in time, height and width
            (`StepBatch.axes`), and p is for each frequency that on its axis. With dynamic RoPE, each sequence has its own
            frequencies. Source: Su et al. 2021; for scaled RoPE, Transformers' `modeling_rope_utils`.
        """,
    ),
    OpSpec(
        name="rope",
        inputs=(Operand("x", "[T, heads * head_dim]"), Operand("table", "[T, rot]")),
        outputs=(Operand("y", "[T, heads * head_dim]"),),
        attrs=(
            step_attr("heads", INT),
            step_attr("head_dim", INT),
            Attr("interleaved", BOOL, "pairs are (2i, 2i + 1); otherwise (i, i + rot/2)", flag="interleaved"),
            step_attr("offset", INT, "first rotated element of a head", 0),
        ),
        fits=_rope_fits,
        in_place=((0, 0),),
        code=8,
        doc="""
            Rotates elements [offset, offset + rot) of each head, pair by pair, by the angles a of `table`. The other elements
            are copied.

                (x_i, x_j) -> (x_i cos a - x_j sin a, x_j cos a + x_i sin a)

            Source: Su et al. 2021.
        """,
    ),
    OpSpec(
        name="position_scale",
        inputs=(_X,),
        outputs=(_Y,),
        attrs=(
            Attr("beta", FLOAT, step_field="scale"),
            Attr("length", INT, "positions with the same factor", step_field="window"),
            step_attr("offset", INT, "added to the position", 0),
        ),
        fits=lambda n, g: same_widths(n, g) and n.attrs["length"] >= 1 and n.attrs.get("offset", 0) >= 0,
        rows="tokens",
        in_place=((0, 0),),
        code=41,
        doc="""
            For the position p of each row:

                y = (1 + beta * log(1 + floor((p + offset) / length))) * x

            Scales queries, so that attention does not become flatter over long texts. Source: Nakanishi 2025, Scalable-Softmax;
            `attn_temperature_tuning` of Llama 4, `llama_4_scaling_beta` of Ministral 3.
        """,
    ),
    OpSpec(
        name="select_rows",
        origin="rule",
        inputs=(_X,),
        outputs=(Operand("y", "[R, N]"),),
        fits=same_widths,
        rows="select",
        code=14,
        doc="""
            y = the rows of x for which the step computes logits (`StepBatch.logit_rows`). Rule `last_logits` inserts it before
            the final norm; without that rule, a backend's lowering inserts it after `lm_head`.
        """,
    ),
    OpSpec(
        name="convert",
        origin="lowering",
        inputs=(_X,),
        outputs=(_Y,),
        fits=same_widths,
        code=5,
        doc="""
            y = x in another kind of rows: bf16 (rounded to nearest even), or quantized in groups of 32 elements to 8 bits (q8)
            or 16 bits (q16), with a scale and a sum for each group. The formats are described in `native/include/dso.h`.
        """,
    ),
)
