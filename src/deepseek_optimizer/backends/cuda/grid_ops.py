"""One function per op of patches in a grid, as in `ops.py`."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...graph.ir import Node
from .kernels import grids
from .ops import Op, Run, Values


def _places(run: Run) -> torch.Tensor:
    assert run.at.axes is not None  # of graphs with such an op
    return run.at.axes


def _grid_queries(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    by_row, by_col = (run.weights.vectors[name] for name in node.weights)
    grids.grid_queries(inputs[0], _places(run), by_row, by_col, outputs[0], node.attrs["heads"], node.attrs["scale"])


def _grid_keys(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    a = node.attrs
    grids.grid_keys(inputs[0], _places(run), outputs[0], a["heads"], a["grid_rows"], a["grid_cols"])


def _zero_padding(run: Run, node: Node, inputs: Values, outputs: Values) -> None:
    grids.zero_padding(inputs[0], _places(run)[0], outputs[0])


GRID_OPS: Mapping[str, Op] = {
    "grid_keys": _grid_keys,
    "grid_queries": _grid_queries,
    "zero_padding": _zero_padding,
}
