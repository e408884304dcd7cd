"""Mixture of experts: routing, and the products of the chosen experts.

`routes` [T, 2 * top_k] holds a token's chosen experts, ascending, as floats, then their weights. In values with top_k rows per
token, row t * top_k + j belongs to token t and its j-th chosen expert.
"""

from __future__ import annotations

from typing import Literal, get_args

from ..ir import Graph, Node
from .products import ACTIVATION
from .spec import BOOL, FLOAT, INT, NAME, NAMES, Attr, Operand, OpSpec, Shapes, one_of, step_attr

StackLayout = Literal["rows", "columns", "interleaved"]  # as in quant/transposed_stack.py
LAYOUT = one_of(*get_args(StackLayout))

_EXPERTS, _TOP_K = step_attr("experts", INT), step_attr("top_k", INT, "experts per token")
_ROUTES = Operand("routes", "[T, 2 * top_k]")
_SCORING = Attr(
    "scoring", one_of("softmax", "sigmoid", "sqrtsoftplus"), "", flag="sigmoid", flag_value="sigmoid",
    more_flags=(("sqrtsoftplus", "sqrt_softplus"),),
)  # fmt: skip
_NORMALIZE = Attr("normalize", BOOL, "weights sum to `scale`", flag="normalize")
_SCALE = step_attr("scale", FLOAT)
_BY_TOKEN = (_EXPERTS, _TOP_K, _SCORING, _NORMALIZE, _SCALE)
_ROUTING = (
    Attr("bias", NAME, "b [E]"),
    _EXPERTS,
    _TOP_K,
    step_attr("groups", INT),
    step_attr("top_groups", INT, "groups per token"),
    _SCORING,
    Attr("group_score", one_of("max", "top2"), "", flag="top2", flag_value="top2"),
    _NORMALIZE,
    _SCALE,
)
_PRODUCT = (
    _EXPERTS,
    _TOP_K,
    Attr("biases", NAMES, "of the matrices: one tensor for all experts", (None,)),
    Attr("layout", LAYOUT, "how Transformers stores the weight, see there; packed stacks are always the same", "rows"),
    Attr("weigh_input", BOOL, "weights multiply the inputs of experts, not their outputs", False, flag="weigh_input"),
    Attr("grouped", BOOL, "compute by expert instead of by token, so that an expert's weights are read once", flag="grouped"),
    Attr("first", INT, "number of the weight's first expert", 0, step_field="offset"),
    Attr("of", INT, "with a part of the experts, number of all; 0: the weight has all", 0, step_field="groups"),
)
_WEIGHT = Attr("weight", NAME, "of the `experts_gate_up` that the host computes")
_PHASES = "With `grouped` (rule `experts`), the rows of one expert are multiplied together. The results are the same."


def _router_fits(node: Node, _: Graph) -> bool:
    a = node.attrs
    grouped = 1 <= a["top_groups"] <= a["groups"] and a["experts"] % a["groups"] == 0
    enough = grouped and a["top_k"] <= a["top_groups"] * (a["experts"] // a["groups"])
    return bool(enough and node.outputs[0].width == 2 * a["top_k"])


def _router_shapes(node: Node, _: Graph) -> Shapes:
    experts = node.attrs["experts"]
    vectors = (*node.weights[1:], node.attrs["bias"], *node.attrs.get("biases", ()))
    return [(node.weights[0], (experts, node.inputs[0].width)), *((name, (experts,)) for name in vectors if name is not None)]


def _product_shapes(node: Node, rows: int) -> Shapes:
    """`rows`: of all matrices of an expert."""
    experts, columns = node.attrs["experts"], node.inputs[0].width
    shape = (experts, columns, rows) if node.attrs.get("layout", "rows") != "rows" else (experts, rows, columns)
    return [(node.weights[0], shape), *((name, (experts, rows)) for name in node.attrs.get("biases", ()) if name is not None)]


def _products_fit(node: Node, many: int) -> bool:
    """`many`: rows per token of the value with several."""
    a, top_k = node.attrs, int(node.attrs["top_k"])
    every = a.get("of", 0) or a["experts"]
    own = 0 <= a.get("first", 0) <= every - a["experts"]
    return bool(node.inputs[1].width == 2 * top_k and many == top_k <= every and own)


SPECS = (
    OpSpec(
        name="router",
        inputs=(Operand("x", "[T, H]"),),
        outputs=(_ROUTES,),
        weights=(Operand("W", "[E, H], fp32"), Operand("f", "[E]", optional=True)),
        attrs=(*_ROUTING, Attr("biases", NAMES, "of the product: (c [E],)", (None,))),
        fits=_router_fits,
        weight_shapes=_router_shapes,
        rows="tokens",
        doc="""
            Scores are s = softmax(x W^T + c), sigmoid(x W^T + c) or, in DeepSeek-V4, sqrt(log(1 + e^(x W^T + c))). Experts are
            chosen by s + b: first the `top_groups` groups with the highest group score, which is the largest s + b of the group
            ("max") or the sum of its two largest ("top2"), then the `top_k` best experts of these groups. If scores are equal,
            the expert with the lower number is chosen. The weight of a chosen expert is scale * s; with `normalize`, s is first
            divided by the sum of s over the chosen experts. If there is a factor f per expert, the weight is finally multiplied
            by it. Lowering turns the op into `linear` and `route`.

            Source: DeepSeekMoE (Dai et al. 2024); DeepSeek-V3, section 2.1.2; f: Gemma 4's `per_expert_scale`.
        """,
    ),
    OpSpec(
        name="hash_router",
        inputs=(Operand("x", "[T, H]"),),
        outputs=(_ROUTES,),
        weights=(Operand("W", "[E, H], fp32"), Operand("table", "[V, top_k], integers")),
        attrs=_BY_TOKEN,
        fits=lambda n, g: n.outputs[0].width == 2 * n.attrs["top_k"],
        weight_shapes=lambda n, g: [
            (n.weights[0], (n.attrs["experts"], n.inputs[0].width)),
            (n.weights[1], (g.vocab_size, n.attrs["top_k"])),
        ],
        rows="tokens",
        doc="""
            `router` with experts chosen by the token's id: those in its row of the table, whatever their scores. Lowering turns
            the op into `linear` and `hash_route`. Source: Roller et al. 2021, Hash Layers; `DeepseekV4HashRouter` of
            Transformers.
        """,
    ),
    OpSpec(
        name="experts_gate_up",
        inputs=(Operand("x", "[T, H]"), _ROUTES),
        outputs=(Operand("h", "[T * top_k, I]"),),
        weights=(Operand("gate_up", "[E, 2 I, H]: the rows of gate, then of up; transposed: [E, H, 2 I]"),),
        attrs=(
            *_PRODUCT,
            ACTIVATION,
            Attr("alpha", FLOAT, "with a limit: factor in the gate's sigmoid", 1.0, step_field="scale"),
            Attr("limit", FLOAT, "of gate and up; 0: none", 0.0, step_field="softcap"),
            Attr("raised", BOOL, "with a limit: u + 1 instead of u", True, flag="plain_up", flag_value=False),
        ),
        fits=lambda n, g: _products_fit(n, n.outputs[0].repeat),
        weight_shapes=lambda n, g: _product_shapes(n, 2 * n.outputs[0].width),
        stacked=2,
        rows="tokens",
        repeated_outputs=(0,),
        product=True,
        any_kind=0,
        code=17,
        kernels=_PHASES,
        doc="""
            h = `swiglu`(gate_e x_t + b_e, up_e x_t + c_e), or `geglu` of them, for each token t and its chosen experts e. With
            a `limit` L > 0, h = (u + 1) * g * sigmoid(alpha * g), where g = min(gate, L) and u is up limited to [-L, L];
            without `raised`, h = u * g * sigmoid(alpha * g) (DeepSeek-V4). The biases are [E, 2 I], in the order of the
            weight's rows. With the layout "rows", the weight is [E, 2 I, H]; with "columns", it is transposed, [E, H, 2 I];
            with "interleaved", it is transposed, and rows of gate and up alternate. With `weigh_input`, gate_e x_t and
            up_e x_t are multiplied by weight_e (Llama 4), and there are no biases. When packed, the weight is a stack of 2 E
            matrices [I, H]: gate and up of each expert in turn.

            Source of the limits: gpt-oss (OpenAI 2025), `GptOssExperts` of Transformers.
        """,
    ),
    OpSpec(
        name="experts_down",
        inputs=(Operand("h", "[T * top_k, I]"), _ROUTES),
        outputs=(Operand("y", "[T, H]"),),
        weights=(Operand("down", "[E, H, I]; transposed: [E, I, H]"),),
        attrs=_PRODUCT,
        fits=lambda n, g: _products_fit(n, n.inputs[0].repeat),
        weight_shapes=lambda n, g: _product_shapes(n, n.outputs[0].width),
        stacked=1,
        rows="tokens",
        repeated_inputs=(0,),
        product=True,
        code=18,
        kernels=_PHASES,
        doc="""
            y_t = sum over the chosen experts e, ascending, of weight_e * (down_e h + b_e), or of down_e h + b_e with
            `weigh_input`. The biases are [E, H]. With `of`, the sum is over those of the chosen experts whose matrices the
            weight has: [first, first + experts) of `of`; `experts_gate_up` computes these only.
        """,
    ),
    OpSpec(
        name="route",
        origin="lowering",
        inputs=(Operand("scores", "[T, E]: x W^T"),),
        outputs=(_ROUTES,),
        weights=(Operand("f", "[E]", optional=True),),
        attrs=_ROUTING,
        fits=lambda n, g: (n.inputs[0].width, n.outputs[0].width) == (n.attrs["experts"], 2 * n.attrs["top_k"]),
        rows="tokens",
        code=16,
        doc="The part of `router` after the product.",
    ),
    OpSpec(
        name="hash_route",
        origin="lowering",
        inputs=(Operand("scores", "[T, E]: x W^T"),),
        outputs=(_ROUTES,),
        weights=(Operand("table", "[V * top_k]"),),
        attrs=_BY_TOKEN,
        fits=lambda n, g: (n.inputs[0].width, n.outputs[0].width) == (n.attrs["experts"], 2 * n.attrs["top_k"]),
        rows="tokens",
        code=47,
        doc="The part of `hash_router` after the product.",
    ),
    OpSpec(
        name="experts_send",
        origin="lowering",
        inputs=(Operand("x", "[T, H]"), _ROUTES),
        outputs=(Operand("z", "[T, H + 2 * top_k]"),),
        attrs=(_WEIGHT,),
        fits=lambda n, g: sum(v.width for v in n.inputs) == n.outputs[0].width,
        rows="tokens",
        doc="""
            Each row of z contains the elements of x, then those of routes: what the host needs to compute the experts with this
            weight. Backend `cuda` puts this op and `experts_receive` in the place of `experts_gate_up` and `experts_down` whose
            weights are in the host's memory.
        """,
    ),
    OpSpec(
        name="experts_receive",
        origin="lowering",
        inputs=(Operand("z", "[T, H + 2 * top_k]"),),
        outputs=(Operand("y", "[T, H]"),),
        attrs=(_WEIGHT,),
        fits=lambda n, g: n.outputs[0].width <= n.inputs[0].width,
        rows="tokens",
        doc="y = what the host has computed from z: the result of `experts_down`.",
    ),
)
