"""Hyper-connections: a residual of several streams, mixed before and after every block.

A row of `streams` holds the n streams of a token one after the other, S_0 to S_(n-1), H elements each. Source: Zhu et al. 2024,
Hyper-Connections; Xie et al. 2026, mHC; `DeepseekV4HyperConnection` of Transformers.
"""

from __future__ import annotations

from ..ir import Graph, Node
from .spec import FLOAT, INT, Attr, Operand, OpSpec, step_attr

_STREAMS, _WEIGHTS = Operand("S", "[T, n * H]"), Operand("weights", "[T, n] or [T, (2 + n) * n]")
_COUNT = Attr("streams", INT, "n", step_field="groups")


def _counts(n: int) -> tuple[int, int]:
    """Widths of weights: of those that collapse streams only, and of all."""
    return n, (2 + n) * n


def _weights_fit(node: Node, _: Graph) -> bool:
    n, (mix,), (weights,) = node.attrs["streams"], node.inputs, node.outputs
    return bool(n >= 1 and node.attrs["steps"] >= 1 and mix.width == weights.width in _counts(n))


def _collapse_fits(node: Node, _: Graph) -> bool:
    n, (streams, weights), (y,) = node.attrs["streams"], node.inputs, node.outputs
    return bool(n >= 1 and streams.width == n * y.width and weights.width in _counts(n))


def _expand_fits(node: Node, _: Graph) -> bool:
    n, (streams, weights, y), (out,) = node.attrs["streams"], node.inputs, node.outputs
    return bool(n >= 1 and streams.width == out.width == n * y.width and weights.width == (2 + n) * n)


SPECS = (
    OpSpec(
        name="stream_weights",
        inputs=(Operand("x", "[T, n] or [T, (2 + n) * n]"),),
        outputs=(_WEIGHTS,),
        weights=(Operand("b", "as wide as x"), Operand("s", "[1] or [3]")),
        attrs=(
            _COUNT,
            Attr("steps", INT, "normalizations of columns", 1, step_field="top_k"),
            step_attr("eps", FLOAT, "e"),
        ),
        fits=_weights_fit,
        weight_shapes=lambda n, g: [
            (n.weights[0], (n.inputs[0].width,)),
            (n.weights[1], (1 if n.inputs[0].width == n.attrs["streams"] else 3,)),
        ],
        in_place=((0, 0),),
        code=48,
        doc="""
            The weights of a hyper-connection: n weights `pre`, and unless x has only those, n weights `post` and a matrix
            `comb` [n, n], row by row:

                pre  = sigmoid(s_0 x_pre + b_pre) + e
                post = 2 sigmoid(s_1 x_post + b_post)
                comb = softmax over each row of (s_2 x_comb + b_comb), plus e

            Then each column of `comb` is divided by its sum plus e, and after that `steps` - 1 times each row and then each
            column: Sinkhorn and Knopp's iteration, towards a doubly stochastic matrix (Sinkhorn and Knopp 1967).
        """,
    ),
    OpSpec(
        name="stream_collapse",
        inputs=(_STREAMS, _WEIGHTS),
        outputs=(Operand("y", "[T, H]"),),
        attrs=(_COUNT,),
        fits=_collapse_fits,
        code=49,
        doc="y = sum over i of pre_i S_i: the input of a block.",
    ),
    OpSpec(
        name="stream_expand",
        inputs=(_STREAMS, _WEIGHTS, Operand("y", "[T, H]")),
        outputs=(Operand("z", "[T, n * H]"),),
        attrs=(_COUNT,),
        fits=_expand_fits,
        code=50,
        doc="z_k = post_k y + sum over j of comb_jk S_j: the streams after a block whose output is y.",
    ),
)
