"""Exchange of rows between the processes that run one model together (`graph/parallel/`).

Every process, called a rank, runs a graph of its own with the same ops in the same order. Where they exchange rows, an op's
input is the rank's own part, and its output is the same in all of them, bit for bit.
"""

from __future__ import annotations

from ..ir import Graph, Node
from .spec import INT, Attr, Operand, OpSpec
from .widths import same_widths

COLLECTIVES = ("all_reduce", "all_gather")

_RANKS = Attr("ranks", INT, "number of processes")
_EACH = Attr("each", INT, "width of all parts but the last, which has the rest", step_field="offset")


def _gather_fits(node: Node, _: Graph) -> bool:
    each, ranks, width = node.attrs["each"], node.attrs["ranks"], node.outputs[0].width
    last = width - each * (ranks - 1)
    return bool(ranks > 1 and 0 < last <= each and node.inputs[0].width in (each, last))


SPECS = (
    OpSpec(
        name="all_reduce",
        origin="rule",
        inputs=(Operand("x_r", "[T, N]"),),
        outputs=(Operand("y", "[T, N]"),),
        attrs=(_RANKS,),
        fits=lambda n, g: same_widths(n, g) and n.attrs["ranks"] > 1,
        doc="""
            y = x_0 + x_1 + ..., the sum of all ranks' x, in ascending order of ranks. It follows a product whose columns are
            divided among the ranks. Each rank writes and reads N floats per row and rank. Source: Shoeybi et al. 2019
            (Megatron-LM).
        """,
    ),
    OpSpec(
        name="all_gather",
        origin="rule",
        inputs=(Operand("x_r", "[T or R, n_r]"),),
        outputs=(Operand("y", "[T or R, N]"),),
        attrs=(_RANKS, _EACH),
        fits=_gather_fits,
        returns="logits",
        doc="""
            y = x_0 | x_1 | ..., the elements of all ranks' x, in ascending order of ranks. It follows the head, whose rows are
            divided among the ranks. Each rank writes n_r floats per row and reads N.
        """,
    ),
    OpSpec(
        name="publish",
        origin="lowering",
        inputs=(Operand("x_r", "[T or R, N]"),),
        fits=lambda n, g: True,
        code=64,
        doc="Makes the rank's part visible to the others: the first half of `all_reduce` and of `all_gather`.",
    ),
    OpSpec(
        name="sum_parts",
        origin="lowering",
        outputs=(Operand("y", "[T, N]"),),
        fits=lambda n, g: True,
        code=65,
        doc="Waits for all parts and adds them, in ascending order of ranks.",
    ),
    OpSpec(
        name="join_parts",
        origin="lowering",
        outputs=(Operand("y", "[T or R, N]"),),
        attrs=(_EACH,),
        fits=lambda n, g: True,
        code=66,
        doc="Waits for all parts and joins them, in ascending order of ranks.",
    ),
)
