"""Bidirectional attention, for encoders: a step holds whole sequences, and there is no cache."""

from __future__ import annotations

from ..ir import Graph, Node
from .spec import FLOAT, INT, Operand, OpSpec, step_attr
from .widths import heads_width


def _attention_fits(node: Node, _: Graph) -> bool:
    a, (q, k, v) = node.attrs, (value.width for value in node.inputs)
    heads = q == node.outputs[0].width == heads_width(node, "heads") and a["heads"] % a["kv_heads"] == 0
    return bool(heads and k == v == heads_width(node, "kv_heads") and a["window"] >= 0)


SPECS = (
    OpSpec(
        name="encoder_attention",
        inputs=(
            Operand("q", "[T, heads * head_dim]"),
            Operand("k", "[T, kv_heads * head_dim]"),
            Operand("v", "[T, kv_heads * head_dim]"),
        ),
        outputs=(Operand("o", "[T, heads * head_dim]"),),
        attrs=(
            step_attr("heads", INT),
            step_attr("kv_heads", INT),
            step_attr("head_dim", INT),
            step_attr("scale", FLOAT),
            step_attr("window", INT, "tokens to either side that are visible; 0: all"),
        ),
        fits=_attention_fits,
        rows="tokens",
        code=43,
        kernels="tiles of 64 query rows and 64 keys of a sequence, in fp32.",
        doc="""
            For each query head h, with the keys K and values V of its kv head, h // (heads / kv_heads), over the tokens of its
            sequence in this step:

                o_h = softmax(scale * q_h K^T) V

            Every token is visible; with a window, token i attends to the tokens j with |i - j| <= window. The step contains all
            tokens of each sequence (`context_len` is 0). Softmax is computed over blocks of keys with a running maximum and
            sum. A row's result depends only on its sequence.

            Source: Vaswani et al. 2017; Dao 2023 (FlashAttention-2); windows: Beltagy et al. 2020 (Longformer).
        """,
    ),
)
