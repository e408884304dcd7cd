"""Patches of a picture in a grid: attention with relative positions, and padding. `StepBatch.axes` says where a row is."""

from __future__ import annotations

from ..ir import Graph, Node
from .spec import FLOAT, INT, Operand, OpSpec, Shapes, step_attr
from .widths import heads_width, same_widths

_SHAPE = (
    step_attr("heads", INT),
    step_attr("head_dim", INT, "elements of a head of x"),
    step_attr("grid_rows", INT, "rows of the grid"),
    step_attr("grid_cols", INT, "columns of the grid"),
)
_X, _Y = Operand("x", "[T, heads * head_dim]"), Operand("y", "[T, heads * width]")


def _longer_heads(node: Node, _: Graph) -> bool:
    a, x, y = node.attrs, node.inputs[0].width, node.outputs[0].width
    needed = a["head_dim"] + a["grid_rows"] + a["grid_cols"]
    return bool(x == heads_width(node, "heads") and y % a["heads"] == 0 and y // a["heads"] >= needed and a["grid_cols"] > 0)


def _tables(node: Node, _: Graph) -> Shapes:
    sizes = (node.attrs["grid_rows"], node.attrs["grid_cols"])
    return [(name, (2 * n - 1, node.attrs["head_dim"])) for name, n in zip(node.weights, sizes, strict=True)]


IN_GRIDS = ("grid_queries", "grid_keys", "zero_padding")  # ops that read `StepBatch.axes`
SPECS = (
    OpSpec(
        name="grid_queries",
        inputs=(_X,),
        outputs=(_Y,),
        weights=(Operand("by_row", "[2 * grid_rows - 1, head_dim]"), Operand("by_col", "[2 * grid_cols - 1, head_dim]")),
        attrs=(*_SHAPE, step_attr("scale", FLOAT)),
        fits=_longer_heads,
        weight_shapes=_tables,
        rows="tokens",
        code=59,
        doc="""
            Queries of attention with relative positions in height and width. The head of a row at (i, j) of the grid becomes

                y_h = [scale * x_h, x_h . by_row[i - r + grid_rows - 1] for each r < grid_rows, x_h . by_col[j - c + grid_cols -
                1] for each c < grid_cols, zeros]

            so that its product with the key that `grid_keys` makes of the row at (r, c) is scale * x_h . k_h plus the two terms
            of their distance. i and j are the row's positions in height and width (`StepBatch.axes`).

            Source: Li et al. 2022 (MViTv2), in Segment Anything (Kirillov et al. 2023).
        """,
    ),
    OpSpec(
        name="grid_keys",
        inputs=(_X,),
        outputs=(_Y,),
        attrs=_SHAPE,
        fits=_longer_heads,
        rows="tokens",
        code=60,
        doc="""
            Keys for `grid_queries`: y_h = [x_h, 1 at i of grid_rows, 1 at j of grid_cols, zeros] for a row at (i, j). Values
            get as many elements in this way; `columns` takes their own ones of the result.
        """,
    ),
    OpSpec(
        name="zero_padding",
        inputs=(Operand("x", "[T, N]"),),
        outputs=(Operand("y", "[T, N]"),),
        fits=same_widths,
        rows="tokens",
        in_place=((0, 0),),
        any_kind=0,
        code=61,
        doc="y = x, but zeros for rows of padding: those whose position in time (`StepBatch.axes`) is not 0.",
    ),
)
