"""Attention with relative positions over grids of patches, and padding; `graph/ops/grids.py` has the formulas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch.nn import functional as F

from ...graph.ir import Node
from .step import Step


class Plan(Protocol):
    """What these ops use of a `ReferencePlan`."""

    device: torch.device

    def weight(self, name: str) -> torch.Tensor: ...


def grid_queries(
    x: torch.Tensor, at: torch.Tensor, by_row: torch.Tensor, by_col: torch.Tensor, heads: int, scale: float, width: int
) -> torch.Tensor:
    """Queries with the terms of relative positions, [T, heads * width].

    Args:
        x: [T, heads * head_dim].
        at: int64 [T, 2], row and column of each row of x in the grid.
        by_row, by_col: [2 * n - 1, head_dim], where the grid has n rows or columns.
        heads, scale: attributes of the op.
        width: number of elements of a head of the result.
    """
    own = x.unflatten(-1, (heads, -1))
    parts = [scale * own]
    for axis, table in enumerate((by_row, by_col)):
        count = (len(table) + 1) // 2
        distance = at[:, axis, None] - torch.arange(count, dtype=torch.int64, device=x.device) + count - 1
        parts.append(torch.einsum("thd,tnd->thn", own, table[distance].to(x.dtype)))
    return _filled(torch.cat(parts, -1), width)


def grid_keys(x: torch.Tensor, at: torch.Tensor, rows: int, cols: int, heads: int, width: int) -> torch.Tensor:
    """Keys for `grid_queries`, [T, heads * width].

    Args:
        x, at, heads, width: as there.
        rows, cols: size of the grid.
    """
    own = x.unflatten(-1, (heads, -1))
    places = torch.cat([F.one_hot(at[:, axis], count) for axis, count in enumerate((rows, cols))], -1).to(x.dtype)
    return _filled(torch.cat([own, places[:, None].expand(-1, heads, -1)], -1), width)


def _filled(x: torch.Tensor, width: int) -> torch.Tensor:
    """Heads filled up with zeros, one after the other."""
    return F.pad(x, (0, width - x.shape[-1])).flatten(-2)


def zero_padding(x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """x with zeros in the rows of padding, bool [T]."""
    return x.masked_fill(padding[:, None], 0.0)


def _axes(plan: Plan, step: Step) -> torch.Tensor:
    """The positions of rows in time, height and width, int64 [T, 3]."""
    assert step.batch.axes is not None  # was checked
    return torch.from_numpy(step.batch.axes).to(plan.device, torch.int64)


def _grid_queries(plan: Plan, step: Step, node: Node, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    a, (by_row, by_col) = node.attrs, map(plan.weight, node.weights)
    width = node.outputs[0].width // a["heads"]
    return (grid_queries(x, _axes(plan, step)[:, 1:], by_row, by_col, a["heads"], a["scale"], width),)


def _grid_keys(plan: Plan, step: Step, node: Node, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    a, width = node.attrs, node.outputs[0].width // node.attrs["heads"]
    return (grid_keys(x, _axes(plan, step)[:, 1:], a["grid_rows"], a["grid_cols"], a["heads"], width),)


def _zero_padding(plan: Plan, step: Step, node: Node, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (zero_padding(x, _axes(plan, step)[:, 0] != 0),)


OPS: Mapping[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    "grid_queries": _grid_queries,
    "grid_keys": _grid_keys,
    "zero_padding": _zero_padding,
}
