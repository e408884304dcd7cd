"""The backend: compiles graphs for a device, and runs single operations there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from ...errors import BackendError
from ...graph.ir import Graph, LatentSpec, RowsSpec
from ...graph.validate import check_graph
from ...quant import products, reference_packer
from ...quant.packed import PackedMatrix, PackedWeight
from ...system.memory import FreeMemory, device_memory
from ..base import DEFAULTS, PHASES, AdapterStore, Backend, Capabilities, CompileOptions, FileMapping, Norm
from .adapters import CudaAdapters
from .alternative import Chosen
from .buckets import MOST_ROWS
from .device import Device, device_of, launching_on
from .division import DEFAULT, Division
from .gates import OF_OPS
from .kernels import elementwise, linear, norm
from .kernels.precision import EMULATED
from .latent_store import CudaLatentStore
from .layouts import LAYOUTS
from .matrices import DeviceMatrix
from .plan import CudaPlan
from .rows_store import CudaRowsStore
from .sizes import CudaSizes
from .states import DeviceStates
from .store import KV_DTYPES, CudaStore
from .supported import check_cache, check_matrix

_FP8 = (8, 9)  # compute capability of cards whose tensor cores multiply E4M3


class CudaBackend(CudaSizes):
    """Implements `Backend` with Triton's kernels.

    Args:
        device: a CUDA device; in Triton's interpreter (TRITON_INTERPRET=1) the CPU too.
        captured: whether plans capture small steps (`DeepSeekConfig.cuda_graphs`).
        seam: what plans ask of the device; None: the device itself.
        host: creates the backend for experts in the host's memory, at their first use; None: there is none.
        division, source: how kernels divide their work, and where that is from (`cost_table.division_for`); None: the default.
        alternatives: what takes the place of own products of many rows (`alternatives.chosen`).

    Raises:
        BackendError: another device.
    """

    name = "cuda"
    isa = threads = note = None
    maps_files = False

    def __init__(
        self,
        device: torch.device,
        captured: bool = True,
        seam: Device | None = None,
        host: Callable[[], Backend] | None = None,
        division: Division | None = None,
        source: str = "",
        alternatives: tuple[Chosen, ...] = (),
    ) -> None:
        if device.type != "cuda" and not EMULATED:
            raise BackendError(f"the cuda backend cannot run on {device}; move the model with model.to('cuda')")
        self.device, self._seam = device, seam or device_of(device)
        self.captures = captured and self._seam.captures
        self._create_host = host
        self.division, self._source, self.alternatives = division or DEFAULT, source, alternatives
        self._host: Backend | None = None

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            name=self.name,
            device_type=self.device.type,
            phases=PHASES,
            weight_formats=tuple(LAYOUTS),
            kv_dtypes=tuple(KV_DTYPES),
            attention_modes=("flash", "eager", "sliding", "sparse"),
            adapters=True,
            activations=("auto", "fp8"),
            host_experts=self._create_host is not None,
            kernel_divisions=True,
        )

    @property
    def detail(self) -> str:
        where = (
            f" on {torch.cuda.get_device_name(self.device)}"
            if self.device.type == "cuda"
            else f"'s interpreter on {self.device}"
        )
        graphs = f"; steps of up to {MOST_ROWS} rows as CUDA graphs" if self.captures else ""
        host = f"; experts on the CPU ({self._host.detail})" if self._host is not None else ""
        tuned = f"; {self._source}" if self._source else ""
        return f"Triton{where}{graphs}{tuned}{host}"

    def compile(
        self, graph: Graph, weights: Mapping[str, PackedWeight | torch.Tensor], options: CompileOptions = DEFAULTS
    ) -> CudaPlan:
        """Binds a graph to weights, which are copied to the device as they are packed.

        Raises:
            BackendError: a weight is missing or does not fit, or the graph has an op that this backend does not have yet; or
                experts are to run on the CPU, and there is no backend for it; or the card cannot multiply FP8 and `options`
                ask for it.
            GraphError: the graph is invalid.
        """
        check_graph(graph)
        coded = rounds_to_fp8(self.device, options)
        return CudaPlan(
            graph, weights, self._seam, self.captures, options, self._on_host, self.division, coded, self.alternatives
        )

    def divided(self, division: Division, alternatives: tuple[Chosen, ...] = ()) -> CudaBackend:
        """A backend of the same device that divides work in another way, or has alternatives, to measure it. No experts run on
        the CPU."""
        return CudaBackend(self.device, self.captures, self._seam, division=division, alternatives=alternatives)

    def _on_host(self) -> Backend:
        """The backend of experts in the host's memory."""
        if self._host is None:
            if self._create_host is None:
                raise BackendError("experts cannot run on the CPU: the cuda backend was created without a backend for it")
            self._host = self._create_host()
        return self._host

    def new_store(
        self, graph: Graph, kv_dtype: str, num_blocks: int, num_states: int = 0
    ) -> CudaStore | CudaLatentStore | CudaRowsStore:
        check_cache(graph, kv_dtype)
        spec = graph.cache
        store: CudaStore | CudaLatentStore | CudaRowsStore
        if isinstance(spec, LatentSpec):
            store = CudaLatentStore(spec, kv_dtype, num_blocks, self.device)
        elif isinstance(spec, RowsSpec):
            store = CudaRowsStore(spec, kv_dtype, num_blocks, self.device)
        else:
            store = CudaStore(spec, kv_dtype, num_blocks, self.device)
        if graph.states:
            store.states = DeviceStates(graph.states, num_states, self.device)
        return store

    def new_adapters(self, graph: Graph, slots: int, rank: int, dtype: str) -> AdapterStore:
        return CudaAdapters(graph, slots, rank, dtype, self.device)

    def free_memory(self) -> FreeMemory:
        return device_memory(self.device)

    def thread_context(self) -> AbstractContextManager[None]:
        """That of the CPU's backend if it computes experts; steps on the device need none."""
        return nullcontext() if self._host is None else self._host.thread_context()

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
        rows = self._rows(x)
        out = rows.new_empty(len(rows), matrix.rows)
        with launching_on(self.device):
            linear.linear(rows, self._matrix(matrix, options), self._vector(bias), out)
        return out.view(*x.shape[:-1], matrix.rows)

    def linear_gradient(self, grad: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
        raise self._missing("gradients")

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
        if op not in OF_OPS:
            raise self._missing(f"feed-forward blocks with op {op!r}")
        rows = self._rows(x if norm is None else self.norm(x, *norm))
        (gate, gate_bias), (up, up_bias) = first
        hidden = rows.new_empty(len(rows), gate.rows)
        biases = self._vector(gate_bias), self._vector(up_bias)
        with launching_on(self.device):
            linear.gate_up(rows, self._matrix(gate, options), self._matrix(up, options), biases, hidden, OF_OPS[op])
        result = self.linear(hidden, *down, options).view(*x.shape[:-1], down[0].rows)
        if residual:
            with launching_on(self.device):
                elementwise.apply("add", self._rows(x), self._rows(result), result)
        return result

    def norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        rows, scale = self._rows(x), weight.detach().to(self.device, torch.float32).contiguous()
        out = torch.empty_like(rows)
        with launching_on(self.device):
            if bias is None:
                norm.rms_norm(rows, scale, eps, out)
            else:
                norm.layer_norm(rows, scale, self._vector(bias), eps, out)
        return out.view(x.shape)

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
        raise self._missing("attention without a cache")

    def map_file(self, fd: int, size: int, modified_ns: int, path: Path) -> FileMapping:
        raise BackendError(f"the cuda backend cannot map {path}: weights are copied to the device; read it into memory")

    def check_tensor(self, tensor: torch.Tensor) -> None:
        """Does nothing: no tensor is in a mapped file."""

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach().reshape(-1, x.shape[-1]).to(self.device, torch.float32).contiguous()

    def _vector(self, vector: torch.Tensor | None) -> torch.Tensor | None:
        return None if vector is None else vector.detach().to(self.device, torch.float32).contiguous()

    def _matrix(self, matrix: PackedMatrix, options: CompileOptions) -> DeviceMatrix:
        return DeviceMatrix(
            check_matrix("matrix", matrix, "of a single product"), self.device, rounds_to_fp8(self.device, options)
        )

    def _missing(self, what: str) -> BackendError:
        return BackendError(f'the cuda backend does not have {what} yet; load the model with backend="reference"')

    def __repr__(self) -> str:
        return f"CudaBackend({self.detail})"


def rounds_to_fp8(device: torch.device, options: CompileOptions) -> bool:
    """Whether products with FP8 weights round rows to E4M3. Raises BackendError if the card cannot multiply it."""
    if options.activation != "fp8":
        return False
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < _FP8:
        name = torch.cuda.get_device_name(device)
        raise BackendError(
            f'activation="fp8" needs compute capability 8.9 (Ada, Hopper) or later, but {name} has {found[0]}.{found[1]}; with '
            f'activation="auto", FP8 weights are multiplied in bf16'
        )
    return True
