"""The native CPU backend: graphs compiled to plans that `native/` executes on a thread pool."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...errors import BackendError
from ...graph.ir import Graph
from ...quant import VIEWS
from ...quant.packed import PackedMatrix, PackedWeight
from ...system.memory import FreeMemory, free_memory
from ...system.processor import usable_cpus
from ...system.threads import one_torch_thread
from ..base import DEFAULTS, PHASES, Capabilities, CompileOptions, Norm
from ..registry import BackendSettings, BackendSpec
from . import dense_attention, native, packer
from .adapters import CpuAdapters
from .compile import ACTIVATIONS, compile_graph, row_kind
from .environment import forced_isa, forced_threads, topology_file
from .group import Group
from .mapped_file import MappedFile, check_tensor, map_file
from .plan import CpuPlan, CpuStore
from .sizes import CpuSizes
from .topology import describe, read_topology

__all__ = ["SPEC", "CpuBackend", "CpuPlan", "CpuStore", "exact", "thread_limits", "unavailable_reason"]

ISA_GROUPS = ("avx2", "avx512", "neon")  # ISA names that stand for several variants

unavailable_reason = native.unavailable_reason


def oversubscription(threads: int) -> str | None:
    """A warning if there are more threads than processors that this process may use, else None."""
    usable = native.number(native.library().dso_usable_cpus())
    if threads <= usable:
        return None
    return (
        f"{threads} threads share the {usable} processors that this process may use, and a step waits for the slowest thread: "
        f"leave threads and DSO_THREADS unset, or use {usable}"
    )


def thread_limits() -> tuple[int, int]:
    """How many threads a model takes that is loaded without `threads`, and how many processors this process may use, within the
    control group's quota. The first is smaller where cores have two hyper-threads, and larger only if DSO_THREADS or
    DSO_TOPOLOGY says so. Without a native build, both are the processors.

    Raises:
        ConfigError: DSO_THREADS, DSO_TOPOLOGY or DSO_NUMA is invalid.
    """
    if unavailable_reason() is not None:
        return usable_cpus(), usable_cpus()
    return CpuBackend().threads, native.number(native.library().dso_usable_cpus())


class CpuBackend(CpuSizes):
    """Implements `Backend`: graphs compiled to native plans.

    Args:
        isa: None: DSO_ISA if set, otherwise the best that runs on this machine. "avx2", "avx512", "neon": the best variant of
            that family. "avx2-base", "avx512-base", "avx512-vnni", ...: exactly that variant.
        threads: None: DSO_THREADS if set, otherwise one per core, as far as CPU affinity and cgroup limits allow.
        group: the processes that its plans exchange rows with; None: there are none.

    Raises:
        BackendError: no native build, or the ISA cannot run on this machine (the message says what is missing).
        ConfigError: DSO_THREADS, DSO_TOPOLOGY or DSO_NUMA is invalid.
    """

    name = "cpu"
    device = torch.device("cpu")
    maps_files = True

    def __init__(self, isa: str | None = None, threads: int | None = None, group: Group | None = None) -> None:
        requested = isa or forced_isa()
        threads = threads or forced_threads()
        try:
            variant = _variant(requested)
            if group is None:
                self.context = native.shared_context(variant, threads)
            else:
                self.context = native.context_of_rank(variant, threads, group.index_here, group.ranks_here)
        except BackendError as error:
            if isa is None and requested is not None:
                raise BackendError(f"DSO_ISA={requested}: {error}") from error
            raise
        if group is not None:
            group.join(self.context)

    @property
    def isa(self) -> str:
        return self.context.isa

    @property
    def threads(self) -> int:
        return self.context.threads

    @property
    def topology(self) -> dict[str, Any]:
        """The machine that threads are placed on, for `dso info`."""
        file = topology_file()
        cpus, source = (read_topology(file), f"DSO_TOPOLOGY={file}") if file else (native.machine_cpus(), "the system")
        return describe(cpus, self.context.nodes, source)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            name=self.name,
            device_type=self.device.type,
            phases=PHASES,
            weight_formats=tuple(name for name in native.FORMATS if name not in VIEWS),
            kv_dtypes=tuple(native.KV_TYPES),
            attention_modes=("flash", "eager", "sliding", "sparse"),
            activations=("auto", *ACTIVATIONS),
            isas=tuple(name for name in native.isa_names() if native.isa_runs_here(name)),
            batch_invariant=True,
            training=True,
            adapters=True,
            decode_calls=True,
            drafted_calls=True,
            dense_operations=True,
        )

    @property
    def note(self) -> str | None:
        """See `oversubscription`."""
        return oversubscription(self.threads)

    @property
    def detail(self) -> str:
        return f"{self.isa}, {self.threads} threads"

    def compile(
        self, graph: Graph, weights: Mapping[str, PackedWeight | torch.Tensor], options: CompileOptions = DEFAULTS
    ) -> CpuPlan:
        """See `compile.compile_graph`."""
        return compile_graph(self.context, graph, weights, activation=options.activation)

    def new_store(self, graph: Graph, kv_dtype: str, num_blocks: int, num_states: int = 0) -> CpuStore:
        return CpuStore(self.context, graph.cache, kv_dtype, num_blocks, graph.states, num_states)

    def new_adapters(self, graph: Graph, slots: int, rank: int, dtype: str) -> CpuAdapters:
        return CpuAdapters(graph.adapter_sites, slots, rank, dtype)

    def free_memory(self) -> FreeMemory:
        return free_memory()

    @contextmanager
    def thread_context(self) -> Iterator[None]:
        try:
            with one_torch_thread():
                yield
        finally:
            self.context.kept_rows.clear()
            self.context.outputs.trim()

    def pack(
        self,
        weight: torch.Tensor,
        name: str,
        out: torch.Tensor | None = None,
        importance: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A `quant.Packer` on this backend's threads."""
        return packer.pack(self.context, weight, name, out, importance, scale)

    def map_file(self, fd: int, size: int, modified_ns: int, path: Path) -> MappedFile:
        """A `checkpoint.files.Mapper`."""
        return map_file(fd, size, modified_ns, path)

    def check_tensor(self, tensor: torch.Tensor) -> None:
        """Raises CheckpointChangedError if a tensor is in a mapped file that was changed."""
        check_tensor(tensor)

    def unpack(self, matrix: PackedMatrix, begin: int = 0, end: int | None = None) -> torch.Tensor:
        return packer.unpack(self.context, matrix, begin, end)

    def linear(
        self,
        x: torch.Tensor,
        matrix: PackedMatrix,
        bias: torch.Tensor | None = None,
        options: CompileOptions = DEFAULTS,
        **kinds: Any,
    ) -> torch.Tensor:
        """See `packer.linear`, which documents `kinds`."""
        kinds.setdefault("activation", row_kind(matrix.format, options.activation))
        return packer.linear(self.context, x, matrix, bias, **kinds)

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
        """See `packer.feed_forward`."""
        kinds = [row_kind(matrix.format, options.activation) for matrix, _ in (*first, down)]
        return packer.feed_forward(
            self.context, x, first, op, down, activation=kinds[0], inner=kinds[-1], norm=norm, residual=residual
        )

    def norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        """See `packer.norm`."""
        return packer.norm(self.context, x, weight, bias, eps)

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
        """See `dense_attention.attend`."""
        rounded = options.activation == "int8"
        return dense_attention.attend(self.context, q, k, v, scale, mask, causal=causal, rounded=rounded)

    def linear_gradient(self, grad: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
        """See `packer.linear_gradient`."""
        return packer.linear_gradient(self.context, grad, matrix)


def exact(name: str) -> str:
    """The `isa` argument that selects exactly this one of `native.isa_names()`."""
    return f"{name}-base" if name in ISA_GROUPS else name


def _variant(isa: str | None) -> str | None:
    """The native name of the requested ISA. The library rejects one that cannot run."""
    if isa not in ISA_GROUPS:
        return isa.removesuffix("-base") if isa else None
    members = [n for n in native.isa_names() if n.split("-")[0] == isa]
    return next((n for n in reversed(members) if native.isa_runs_here(n)), isa)


def _unavailable(settings: BackendSettings) -> str | None:
    """None if an ISA was requested by name: then `CpuBackend` raises an error instead of silently using another backend."""
    return None if settings.isa or forced_isa() else unavailable_reason()


def _create(device: torch.device, settings: BackendSettings) -> CpuBackend:
    return CpuBackend(settings.isa, settings.threads)


SPEC = BackendSpec("cpu", _create, CpuSizes, _unavailable, device_types=("cpu",), priority=100)
