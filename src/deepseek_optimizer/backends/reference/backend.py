"""The reference backend: compiles graphs for torch, and packs and multiplies weights with torch alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from ...errors import BackendError
from ...graph.analysis import stack_shapes, weight_shapes
from ...graph.ir import Graph
from ...graph.validate import check_graph
from ...quant import FORMATS, products, reference_packer
from ...quant.packed import PackedMatrix, PackedStack, PackedWeight
from ...system.memory import FreeMemory, device_memory
from ..base import DEFAULTS, PHASES, Capabilities, CompileOptions, FileMapping, Norm
from .adapters import ReferenceAdapters
from .dense_attention import attend
from .ops import FUNCTIONS, layer_norm, rms_norm
from .plan import ReferencePlan, value_bytes
from .scaled_rows import DTYPES, in_fp8
from .states import state_bytes
from .store import Store, make_store, store_block_bytes


class ReferenceSizes:
    """Implements `Sizes`.

    Args:
        dtype: dtype of activations.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    def block_bytes(self, graph: Graph, kv_dtype: str) -> int:
        return store_block_bytes(graph.cache, kv_dtype)

    def state_bytes(self, graph: Graph) -> int:
        return state_bytes(graph.states)

    def buffer_bytes(
        self, graph: Graph, formats: Mapping[str, str], options: CompileOptions, tokens: int, logit_rows: int
    ) -> int:
        values = {value for node in graph.nodes for value in node.outputs}
        return value_bytes(values, self.dtype, tokens, logit_rows)


class ReferenceBackend(ReferenceSizes):
    """Implements `Backend`: runs graphs with torch.

    Args:
        device: device of weights and cache.
        dtype: dtype of weights and activations; torch.float32 is the reference, torch.bfloat16 rounds where Transformers does.
        rounding: None: products use unrounded rows. "format": rows are first rounded to the kind that the native product of
            each weight's format reads; "bf16", "q8" or "q16": to that kind. It separates kernel error from quantization error.
    """

    name = "reference"
    isa = threads = note = None
    maps_files = False

    def __init__(
        self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, rounding: str | None = None
    ) -> None:
        super().__init__(dtype)
        self.device, self.rounding = torch.device(device), rounding

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            name=self.name,
            device_type=self.device.type,
            phases=PHASES,
            weight_formats=tuple(FORMATS),
            kv_dtypes=tuple(DTYPES),
            attention_modes=("flash", "eager", "sliding", "sparse"),
            activations=("auto", "fp8"),
            adapters=True,
        )

    @property
    def detail(self) -> str:
        return f"torch {str(self.dtype).removeprefix('torch.')} on {self.device}"

    def compile(
        self, graph: Graph, weights: Mapping[str, PackedWeight | torch.Tensor], options: CompileOptions = DEFAULTS
    ) -> ReferencePlan:
        """Binds a graph to weights.

        Args:
            weights: parameter path -> packed matrix or stack (dequantized here) or float tensor.

        Raises:
            BackendError: a weight is missing or has the wrong shape.
            GraphError: the graph is invalid.
        """
        check_graph(graph)
        stacks = stack_shapes(graph)
        for name, shape in weight_shapes(graph).items():
            weight = weights.get(name)
            if weight is None:
                raise BackendError(f"the graph needs weight {name!r}, which the model does not have")
            needed, given = shape, tuple(weight.shape)
            if isinstance(weight, PackedStack):
                needed = stacks.get(name, shape)
            if given != needed:
                raise BackendError(f"weight {name!r} has shape {given}, but the graph needs {needed}")
        rounding = "e4m3" if options.activation == "fp8" else self.rounding
        return ReferencePlan(graph, weights, self.device, self.dtype, rounding)

    def new_store(self, graph: Graph, kv_dtype: str, num_blocks: int, num_states: int = 0) -> Store:
        """An empty cache of `num_blocks` blocks and `num_states` slots; kv_dtype is "fp32", "bf16", "int8", "fp8" or "int4"."""
        return make_store(graph.cache, kv_dtype, num_blocks, self.device, graph.states, num_states)

    def new_adapters(self, graph: Graph, slots: int, rank: int, dtype: str) -> ReferenceAdapters:
        return ReferenceAdapters(graph, slots, rank, dtype, self.device)

    def free_memory(self) -> FreeMemory:
        return device_memory(self.device)

    def thread_context(self) -> AbstractContextManager[None]:
        """Does nothing: the backend uses torch's threads."""
        return nullcontext()

    def pack(
        self,
        weight: torch.Tensor,
        name: str,
        out: torch.Tensor | None = None,
        importance: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return reference_packer(weight, name, out, importance, scale)

    def unpack(self, matrix: PackedMatrix, begin: int = 0, end: int | None = None) -> torch.Tensor:
        return products.unpack_rows(matrix, begin, end)

    def linear(
        self, x: torch.Tensor, matrix: PackedMatrix, bias: torch.Tensor | None = None, options: CompileOptions = DEFAULTS
    ) -> torch.Tensor:
        if options.activation == "fp8" and matrix.format == "fp8":
            x = in_fp8(x)
        return products.linear(x, matrix, bias)

    def linear_gradient(self, grad: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
        return products.linear_gradient(grad, matrix)

    def feed_forward(
        self,
        x: torch.Tensor,
        first: Sequence[tuple[PackedMatrix, torch.Tensor | None]],
        op: str,
        down: tuple[PackedMatrix, torch.Tensor | None],
        options: CompileOptions = DEFAULTS,
        *,
        norm: Norm | None = None,
        residual: bool = False,
    ) -> torch.Tensor:
        rows = x if norm is None else self.norm(x, *norm)
        result = self.linear(FUNCTIONS[op](*(self.linear(rows, *one, options) for one in first)), *down, options)
        return x + result if residual else result

    def norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        return rms_norm(x, weight, eps) if bias is None else layer_norm(x, weight, bias, eps)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        mask: torch.Tensor | None = None,
        *,
        causal: bool = False,
        options: CompileOptions = DEFAULTS,
    ) -> torch.Tensor:
        return attend(q, k, v, scale, mask, causal=causal)

    def map_file(self, fd: int, size: int, modified_ns: int, path: Path) -> FileMapping:
        raise BackendError(f"the reference backend cannot map {path}, since it cannot detect changes; read it into memory")

    def check_tensor(self, tensor: torch.Tensor) -> None:
        """Does nothing: no tensor is in a mapped file."""

    def __repr__(self) -> str:
        return f"ReferenceBackend({self.detail})"
