"""Ops with a recurrent state: short convolutions and the gated delta rule.

A state belongs to a sequence and has a fixed size. A step continues from the state that the batch names for each sequence, and
stores states as the batch requests: after the sequence's last row, and after others to return to.
"""

from __future__ import annotations

from ..ir import Graph, Node
from .spec import BOOL, INT, NAME, Attr, Operand, OpSpec, Shapes, one_of, step_attr
from .widths import same_widths

_STATE = step_attr("state", INT, "index of the state in `Graph.states`")


def _has_state(node: Node, graph: Graph, *shape: int) -> bool:
    index = node.attrs["state"]
    return bool(0 <= index < len(graph.states) and graph.states[index].shape == shape)


def _short_conv_fits(node: Node, graph: Graph) -> bool:
    a, width = node.attrs, node.inputs[0].width
    return same_widths(node, graph) and a["kernel"] >= 2 and _has_state(node, graph, a["kernel"] - 1, width)


def _short_conv_shapes(node: Node, _: Graph) -> Shapes:
    width, bias = node.inputs[0].width, node.attrs["bias"]
    return [(node.weights[0], (width, 1, node.attrs["kernel"])), *([(bias, (width,))] if bias is not None else [])]


def _delta_rule_fits(node: Node, graph: Graph) -> bool:
    a, (x, alpha, beta), (y,) = node.attrs, node.inputs, node.outputs
    keys, values = a["k_heads"] * a["k_dim"], a["heads"] * a["v_dim"]
    if min(keys, values) < 1 or a["heads"] % a["k_heads"]:
        return False
    widths = x.width == 2 * keys + values and y.width == values and beta.width == a["heads"]
    gates = alpha.width == a["heads"] * (a["k_dim"] if a["channels"] else 1)
    return widths and gates and _has_state(node, graph, a["heads"], a["k_dim"], a["v_dim"])


def _delta_rule_shapes(node: Node, _: Graph) -> Shapes:
    heads, (a_log, dt_bias) = node.attrs["heads"], node.weights
    if node.attrs["channels"]:
        return [(a_log, (1, 1, heads, 1)), (dt_bias, (heads * node.attrs["k_dim"],))]
    return [(a_log, (heads,)), (dt_bias, (heads,))]


SPECS = (
    OpSpec(
        name="short_conv",
        inputs=(Operand("x", "[T, N]"),),
        outputs=(Operand("y", "[T, N]"),),
        weights=(Operand("w", "[N, 1, kernel]"),),
        attrs=(
            _STATE,
            Attr("kernel", INT, "inputs that an output depends on", step_field="window"),
            Attr("activation", one_of("none", "silu"), "applied to the sum", flag="silu", flag_value="silu"),
            Attr("bias", NAME, "[N]"),
        ),
        fits=_short_conv_fits,
        weight_shapes=_short_conv_shapes,
        rows="tokens",
        code=39,
        doc="""
            A causal convolution over the tokens of a sequence, each element by itself. With x_t of token t (zero before the
            first):

                y_t = activation(bias + sum over j < kernel of w_j * x_(t - kernel + 1 + j))

            State [kernel - 1, N]: the last inputs, oldest first.
        """,
    ),
    OpSpec(
        name="delta_rule",
        inputs=(
            Operand("x", "[T, 2 * k_heads * k_dim + heads * v_dim]"),
            Operand("a", "[T, heads] or [T, heads * k_dim]"),
            Operand("b", "[T, heads]"),
        ),
        outputs=(Operand("o", "[T, heads * v_dim]"),),
        weights=(Operand("A_log", "[heads] or [1, 1, heads, 1]"), Operand("dt_bias", "[heads] or [heads * k_dim]")),
        attrs=(
            _STATE,
            step_attr("heads", INT, "value heads"),
            Attr("k_heads", INT, "query and key heads, which `heads` is a multiple of", step_field="kv_heads"),
            Attr("k_dim", INT, "elements of a query or key", step_field="head_dim"),
            step_attr("v_dim", INT, "elements of a value"),
            Attr("channels", BOOL, "each element of a key has a decay of its own", flag="channels"),
        ),
        fits=_delta_rule_fits,
        weight_shapes=_delta_rule_shapes,
        rows="tokens",
        code=40,
        kernels="one recurrent form for both phases: tiles of 16 columns of a head's state pass over all rows of the step.",
        doc="""
            The gated delta rule. A row of x holds all queries, all keys and all values; value head h uses query and key of head
            h // (heads / k_heads). With q and k divided by their length, sqrt(x . x + 1e-6), and q also by sqrt(k_dim), the
            state S [k_dim, v_dim] of head h and the output are

                S = e^g S
                S = S + k (sigmoid(b_h) (v - S^T k))^T
                o = S^T q         where g = -e^(A_log_h) log(1 + e^(a_h + dt_bias_h))

            With `channels`, a and dt_bias have an element for each of the k_dim rows of S, which decays by its own e^g.

            State [heads, k_dim, v_dim]. Source: Yang et al. 2024, Gated Delta Networks; `channels`: Kimi Team 2025.
        """,
    ),
)
