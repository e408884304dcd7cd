"""The inputs and results of a step, and products with weight matrices."""

from __future__ import annotations

from ..ir import Graph, Node
from .spec import FLOAT, INT, NAME, NAMES, Attr, Operand, OpSpec, Shapes, step_attr

_H = Operand("x", "[T, H]")
_PHASES = "decode: few rows, one pass over the weights; prefill: tiles of rows. Integer formats give the same bits in both."


def matrix_shapes(node: Node, _: Graph) -> Shapes:
    """Matrices [out, in], one per output (gate_up: two for one output), and their biases."""
    biases = node.attrs["biases"] if "biases" in node.attrs else (node.attrs.get("bias"),)
    outputs = node.outputs * (len(node.weights) // max(1, len(node.outputs)))
    matrices = [(name, (out.width, node.inputs[0].width)) for name, out in zip(node.weights, outputs, strict=True)]
    return [*matrices, *((name, (out.width,)) for name, out in zip(biases, outputs, strict=False) if name is not None)]


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
        doc="x_t = scale * table[token_t]; if the step has `inputs_embeds`, x contains these rows instead.",
    ),
    OpSpec(
        name="state_in",
        outputs=(_H,),
        fits=lambda n, g: n.outputs[0].width == g.hidden_size,
        rows="tokens",
        code=27,
        doc="""
            x = the step's `states`: hidden states of another plan, the input of an MTP layer (DeepSeek-V3, section 2.2).
        """,
    ),
    OpSpec(
        name="linear",
        inputs=(Operand("x", "[T, K]"),),
        outputs=(Operand("y_i", "[T, N_i]", many=True),),
        weights=(Operand("W_i", "[N_i, K]", many=True),),
        attrs=(Attr("biases", NAMES, "b_i [N_i] of each matrix"),),
        fits=lambda n, g: len(n.outputs) == len(n.weights) == len(n.attrs["biases"]),
        weight_shapes=matrix_shapes,
        product=True,
        code=6,
        kernels=_PHASES,
        doc="y_i = x W_i^T + b_i. Rule `qkv` combines products over one input into a node with several matrices.",
    ),
    OpSpec(
        name="gate_up",
        origin="rule",
        inputs=(Operand("x", "[T, K]"),),
        outputs=(Operand("h", "[T, N]"),),
        weights=(Operand("gate", "[N, K]"), Operand("up", "[N, K]")),
        attrs=(Attr("biases", NAMES, "of gate and of up"),),
        fits=lambda n, g: len(n.attrs["biases"]) == 2,
        weight_shapes=matrix_shapes,
        product=True,
        any_kind=0,
        code=13,
        kernels=_PHASES,
        doc="h = `swiglu`(x gate^T + b_gate, x up^T + b_up). Created by rule `gate_up`.",
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
        name="lm_head",
        inputs=(Operand("x", "[T or R, H]"),),
        outputs=(Operand("logits", "[T or R, V]"),),
        weights=(Operand("W", "[V, H]"),),
        attrs=(Attr("bias", NAME, "[V]"),),
        fits=lambda n, g: (n.inputs[0].width, n.outputs[0].width) == (g.hidden_size, g.vocab_size),
        weight_shapes=matrix_shapes,
        returns="logits",
        product=True,
        code=6,
        kernels=_PHASES,
        doc="logits = x W^T + bias: the step's result. A graph has at most one.",
    ),
)
