"""Compiles graphs for torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...errors import BackendError
from ...graph.analysis import stack_shapes, weight_shapes
from ...graph.ir import Graph
from ...graph.validate import check_graph
from ...quant.packed import PackedStack, PackedWeight
from .plan import ReferencePlan
from .store import Store, make_store, store_block_bytes


class ReferenceBackend:
    """Runs graphs with torch.

    Args:
        device: where weights and cache live.
        dtype: of weights and rows; torch.float32 gives the oracle, torch.bfloat16 rounds where Transformers does.
    """

    name = "reference"

    def __init__(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype = torch.device(device), dtype

    @property
    def detail(self) -> str:
        return f"torch {str(self.dtype).removeprefix('torch.')} on {self.device}"

    def compile(
        self, graph: Graph, weights: Mapping[str, PackedWeight | torch.Tensor], *, activation: str | None = None
    ) -> ReferencePlan:
        """Binds a graph to weights.

        Args:
            weights: parameter path -> packed matrix or stack (dequantised here) or float tensor.
            activation: None: products read rows as they are. "format": rows are rounded first to what the native product of
                each weight's format reads; "bf16", "q8" or "q16": to that. So kernel error and quantisation error can be told
                apart.

        Raises:
            BackendError: a weight is missing or has the wrong shape.
            GraphError: the graph is not well formed.
        """
        check_graph(graph)
        stacks = stack_shapes(graph)
        for name, shape in weight_shapes(graph).items():
            weight = weights.get(name)
            if weight is None:
                raise BackendError(f"the graph needs weight {name!r}, which is not given")
            needed, given = shape, tuple(weight.shape)
            if isinstance(weight, PackedStack):
                needed = stacks.get(name, shape)
            if given != needed:
                raise BackendError(f"weight {name!r} has shape {given}, the graph needs {needed}")
        return ReferencePlan(graph, weights, self.device, self.dtype, activation)

    def new_store(self, graph: Graph, kv_dtype: str, num_blocks: int) -> Store:
        """An empty cache of `num_blocks` blocks; kv_dtype is "fp32", "bf16" or "int8"."""
        return make_store(graph.cache, kv_dtype, num_blocks, self.device)

    def block_bytes(self, graph: Graph, kv_dtype: str) -> int:
        """Bytes of one block, all layers together."""
        return store_block_bytes(graph.cache, kv_dtype)

    def __repr__(self) -> str:
        return f"ReferenceBackend({self.detail})"
