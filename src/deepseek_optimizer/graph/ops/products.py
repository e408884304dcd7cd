"""The inputs and results of a step, and products with weight matrices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..ir import Graph, Node
from .spec import FLOAT, INT, NAME, NAMES, ROWS, Attr, Operand, OpSpec, Shapes, one_of, step_attr

_H = Operand("x", "[T, H]")
_PHASES = "decode: few rows, one pass over the weights; prefill: tiles of rows. Integer formats give the same bits in both."


_ROWS = Attr(
    "rows", ROWS, "per matrix (begin, end, total): the product uses rows [begin, end) of `total`, of the bias too", None
)
ACTIVATION = Attr(
    "activation", one_of("silu", "gelu"), "of the gate, as in `swiglu` or `geglu`", "silu", flag="gelu", flag_value="gelu"
)

_SITE = Attr(
    "site",
    INT,
    "set by lowering, with results of `lora_down` as further inputs: site of the first product",
    0,
    step_field="index",
)

GATED = {"silu": "swiglu", "gelu": "geglu"}  # activation of the gate -> op that applies it


def matrix_shapes(node: Node, _: Graph) -> Shapes:
    """Matrices [out, in], one per output (gate_up: two for one output), and their biases."""
    biases = node.attrs["biases"] if "biases" in node.attrs else (node.attrs.get("bias"),)
    outputs = node.outputs * (len(node.weights) // max(1, len(node.outputs)))
    rows = [out.width if part is None else part[2] for out, part in zip(outputs, rows_of(node), strict=True)]
    matrices = [(name, (count, node.inputs[0].width)) for name, count in zip(node.weights, rows, strict=True)]
    return [*matrices, *((name, (count,)) for name, count in zip(biases, rows, strict=False) if name is not None)]


def rows_of(node: Node) -> tuple[tuple[int, int, int] | None, ...]:
    """For each matrix of a product the rows that it uses, as in attribute `rows`; None: all of them."""
    rows: tuple[tuple[int, int, int] | None, ...] | None = node.attrs.get("rows")
    return (None,) * len(node.weights) if rows is None else rows


def merged_rows(nodes: Iterable[Node]) -> dict[str, Any]:
    """Attribute `rows` of a node that combines the matrices of several products; none if all use whole matrices."""
    rows = tuple(part for node in nodes for part in rows_of(node))
    return {} if all(part is None for part in rows) else {"rows": rows}


def _rows_fit(node: Node) -> bool:
    outputs = node.outputs * (len(node.weights) // max(1, len(node.outputs)))
    rows = rows_of(node)
    return len(rows) == len(outputs) and all(
        part is None or (0 <= part[0] and part[1] - part[0] == out.width and part[1] <= part[2])
        for part, out in zip(rows, outputs, strict=True)
    )


def _linear_fits(node: Node, _: Graph) -> bool:
    return len(node.outputs) == len(node.weights) == len(node.attrs["biases"]) and _rows_fit(node)


def _head_fits(node: Node, graph: Graph) -> bool:
    gathered = any(n.op == "all_gather" and n.inputs == node.outputs for n in graph.nodes)
    return node.inputs[0].width == graph.hidden_size and (gathered or node.outputs[0].width == graph.logits_width)


SPECS = (
    OpSpec(
        name="embedding",
        outputs=(_H,),
        weights=(Operand("table", "[V, H]"),),
        attrs=(step_attr("scale", FLOAT),),
        fits=lambda n, g: n.outputs[0].width == g.hidden_size,
        weight_shapes=lambda n, g: [(n.weights[0], (g.vocab_size, g.hidden_size))],
        rows="tokens",
        code=1,
        doc="x_t = scale * table[token_t]; if the step has `inputs_embeds`, x contains these rows instead, unscaled.",
    ),
    OpSpec(
        name="lookup",
        outputs=(Operand("y", "[T, N]"),),
        weights=(Operand("table", "[entries, N]"),),
        attrs=(step_attr("scale", FLOAT), Attr("entries", INT, "rows of the table, at least V")),
        fits=lambda n, g: n.attrs["entries"] >= g.vocab_size,
        weight_shapes=lambda n, g: [(n.weights[0], (n.attrs["entries"], n.outputs[0].width))],
        rows="tokens",
        code=1,
        doc="""
            y_t = scale * table[token_t], as `embedding`, but whether or not the step has `inputs_embeds`: it always needs token
            ids. Gemma 4's per-layer embeddings are such a table.
        """,
    ),
    OpSpec(
        name="state_in",
        outputs=(Operand("x", "[T, N]"),),
        fits=lambda n, g: n.outputs[0].width == g.draft_width,
        rows="tokens",
        code=27,
        doc="""
            x = the step's `states`: draft states of another plan (`draft_out`), the input of an MTP layer (DeepSeek-V3, section
            2.2); or the embeddings that an encoder's module has computed.
        """,
    ),
    OpSpec(
        name="linear",
        inputs=(Operand("x", "[T, K]"),),
        outputs=(Operand("y_i", "[T, N_i]", many=True),),
        weights=(Operand("W_i", "[N_i, K]", many=True),),
        attrs=(Attr("biases", NAMES, "b_i [N_i] of each matrix"), _ROWS, _SITE),
        fits=_linear_fits,
        weight_shapes=matrix_shapes,
        product=True,
        code=6,
        kernels=_PHASES,
        doc="""
            y_i = x W_i^T + b_i. Rule `qkv` combines products over one input into a node with several matrices. Where a
            checkpoint stores several matrices as one, nodes name that one and the rows of it that they use.
        """,
    ),
    OpSpec(
        name="linear_gelu",
        origin="lowering",
        inputs=(Operand("x", "[T, K]"),),
        outputs=(Operand("h", "[T, N]"),),
        weights=(Operand("W", "[N, K]"),),
        attrs=(
            Attr("biases", NAMES, "b [N]"),
            Attr("activation", one_of("gelu", "gelu_erf"), "the op", flag="gelu", flag_value="gelu"),
            _ROWS,
            _SITE,
        ),
        fits=_linear_fits,
        weight_shapes=matrix_shapes,
        product=True,
        any_kind=0,
        code=57,
        kernels=_PHASES,
        doc="h = `gelu`(x W^T + b), or `gelu_erf` of it. Made by lowering from a product that only the activation reads.",
    ),
    OpSpec(
        name="gate_up",
        origin="rule",
        inputs=(Operand("x", "[T, K]"),),
        outputs=(Operand("h", "[T, N]"),),
        weights=(Operand("gate", "[N, K]"), Operand("up", "[N, K]")),
        attrs=(Attr("biases", NAMES, "of gate and of up"), _ROWS, ACTIVATION, _SITE),
        fits=lambda n, g: len(n.attrs["biases"]) == 2 and _rows_fit(n),
        weight_shapes=matrix_shapes,
        product=True,
        any_kind=0,
        code=13,
        kernels=_PHASES,
        doc="h = `swiglu`(x gate^T + b_gate, x up^T + b_up), or `geglu` of them. Created by rule `gate_up`.",
    ),
    OpSpec(
        name="hidden_out",
        inputs=(_H,),
        attrs=(Attr("index", INT, "number of the hidden state, 0 for the embedding", step_field="layer"),),
        fits=lambda n, g: n.inputs[0].width == g.hidden_size,
        returns="hidden states",
        rows="tokens",
        code=15,
        doc="Returns x as hidden state `index`, if the step asks for hidden states.",
    ),
    OpSpec(
        name="draft_out",
        inputs=(Operand("x", "[T, N]"),),
        fits=lambda n, g: n.inputs[0].width == g.draft_width,
        returns="draft states",
        rows="tokens",
        code=63,
        doc="""
            Returns x, if the step asks for draft states: what an MTP layer takes as `states`. Without such a node, those are
            the last hidden states. DeepSeek-V4's MTP layers take all residual streams of a token.
        """,
    ),
    OpSpec(
        name="lm_head",
        inputs=(Operand("x", "[T or R, H]"),),
        outputs=(Operand("logits", "[T or R, V]"),),
        weights=(Operand("W", "[V, H]"),),
        attrs=(
            Attr("bias", NAME, "[V]"),
            Attr("scale", FLOAT, default=1.0),
            Attr("softcap", FLOAT, "limit of the logits; 0: none", 0.0),
        ),
        fits=_head_fits,
        weight_shapes=matrix_shapes,
        returns="logits",
        product=True,
        code=6,
        kernels=_PHASES,
        doc="""
            logits = scale * (x W^T + bias): the step's result. With a `softcap` c, c * tanh(logits / c) (Gemma Team 2024). A
            graph has at most one such node. V is the vocabulary's size, or that of the draft vocabulary if there is one; in the
            graph of one of several processes, the number of its rows, and an `all_gather` follows.
        """,
    ),
)
