"""The stacks of kv_b that absorbed attention reads, see `backends.kv_b`, packed by the native kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import BackendError
from ...graph.ir import Graph, Node
from ...quant import get_format
from ...quant.base import TILE_ROWS
from ...quant.packed import PackedMatrix, PackedStack
from ...quant.tiles import empty_stack
from ..kv_b import key_stack, value_stack
from . import packer
from .native import Context


def absorbs(node: Node) -> bool:
    """Whether plans run this attention in absorbed form. Sparse attention always is, whatever the graph says: expanding the few
    tokens that a row chose, for that row alone, is never cheaper."""
    return node.op == "mla_attention" and (node.attrs["form"] == "absorbed" or len(node.inputs) > 1)


def absorbed_stacks(context: Context, graph: Graph, weights: Mapping[str, Any]) -> dict[str, PackedStack]:
    """Both stacks of every kv_b that the graph absorbs, by the names above. Other weights are ignored.

    Raises:
        BackendError: kv_b is missing, not packed, or has the wrong shape.
    """
    stacks = {}
    for node in graph.nodes:
        if not absorbs(node):
            continue
        (name,), a = node.weights, node.attrs
        matrix, shape = weights.get(name), (a["heads"] * (a["nope"] + a["v_dim"]), a["rank"])
        if not isinstance(matrix, PackedMatrix) or (matrix.rows, matrix.cols) != shape:
            raise BackendError(f"latent attention needs {name!r} as a packed matrix of {shape[0]} x {shape[1]}")
        stacks[key_stack(name)] = _keys(context, matrix, a["heads"], a["nope"], a["v_dim"])
        stacks[value_stack(name)] = _values(context, matrix, a["heads"], a["nope"], a["v_dim"])
    return stacks


def _keys(context: Context, kv_b: PackedMatrix, heads: int, nope: int, v_dim: int) -> PackedStack:
    stack = _empty("fp32" if kv_b.format == "fp32" else "bf16", heads, kv_b.cols, nope)
    for head, tiles in enumerate(stack.data):
        begin = head * (nope + v_dim)
        packer.pack(context, packer.unpack(context, kv_b, begin, begin + nope).T.contiguous(), stack.format, tiles)
    return stack


def _values(context: Context, kv_b: PackedMatrix, heads: int, nope: int, v_dim: int) -> PackedStack:
    if nope % TILE_ROWS == 0 and v_dim % TILE_ROWS == 0:
        tiles = kv_b.data.unflatten(0, (heads, -1))[:, nope // TILE_ROWS :].contiguous()
        return PackedStack(kv_b.format, heads, v_dim, kv_b.cols, tiles)
    stack = _empty("fp32" if kv_b.format == "fp32" else "bf16", heads, v_dim, kv_b.cols)
    for head, tiles in enumerate(stack.data):
        end = (head + 1) * (nope + v_dim)
        packer.pack(context, packer.unpack(context, kv_b, end - v_dim, end), stack.format, tiles)
    return stack


def _empty(format_name: str, count: int, rows: int, cols: int) -> PackedStack:
    return PackedStack(format_name, count, rows, cols, empty_stack(count, rows, cols, get_format(format_name).tile_bytes))
