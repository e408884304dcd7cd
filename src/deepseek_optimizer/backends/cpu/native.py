"""The native library through ctypes: the functions of `native/include/dso.h`, with error codes converted to exceptions.

Nothing is loaded at import: `library()` loads and checks the shared object at its first call.
"""

from __future__ import annotations

import ctypes as C
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...errors import BackendError, CheckpointChangedError, NotEnoughMemoryError, RankLostError
from ...graph.ir import CacheSpec, LatentSpec, RowsSpec, StateSpec
from . import native_train
from .buffers import Outputs, checking
from .environment import memory_nodes, topology_file
from .kept_rows import KeptRows
from .structs import I32, I64, PTR, CacheShape, NativeCpu, StateShape
from .topology import Cpu, cpus_of_rank, read_topology

ABI_VERSION = 20
BLOCK_TOKENS = 32

FORMATS = {
    "fp32": 0, "bf16": 1, "int8": 2, "int4": 3, "q4_1": 4, "fp8": 5, "q2_k": 6, "q3_k": 7, "q4_k": 8, "q5_k": 9, "q6_k": 10,
    "iq4_xs": 11, "iq4_nl": 12, "q5_0": 13, "q5_1": 14, "mxfp4": 15, "int3": 16,
    "int8_nested": 17, "int4_nested": 18,
}  # fmt: skip
VECTOR = 100
SLOT_KINDS = {"f32": 0, "bf16": 1, "q8": 2, "q16": 3, "logits": 4}
KV_TYPES = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}
FLAGS = {"eager": 1, "interleaved": 2, "grouped": 4, "expand": 8, "last": 16, "sigmoid": 32, "top2": 64, "normalize": 128,
         "gelu": 256, "silu": 512, "channels": 1024, "chunked": 2048, "weigh_input": 4096, "ids": 8192,
         "sqrt_softplus": 16384, "plain_up": 32768, "overlap": 65536,
         "causal": 131072, "shared": 262144}  # fmt: skip
_EINVAL, _ENOMEM, _EFILE, _ELOST = 1, 2, 5, 7
UNDECIDED = -1
NODES = {"off": 0, "move": 1, "copy": 2}


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "dso_abi_version": (I32, []),
    "dso_last_error": (C.c_char_p, []),
    "dso_isa_count": (I32, []),
    "dso_isa_name": (C.c_char_p, [I32]),
    "dso_isa_runs_here": (I32, [C.c_char_p]),
    "dso_cpu_description": (C.c_char_p, []),
    "dso_context_create": (I32, [C.c_char_p, I32, PTR]),
    "dso_context_create_on": (I32, [C.c_char_p, I32, PTR, I32, I32, PTR]),
    "dso_context_nodes": (I32, [PTR, PTR, I32]),
    "dso_context_destroy": (None, [PTR]),
    "dso_context_isa": (C.c_char_p, [PTR]),
    "dso_context_threads": (I32, [PTR]),
    "dso_context_set_checked": (I32, [PTR, I32]),
    "dso_context_join": (I32, [PTR, PTR]),
    "dso_group_create": (I32, [I32, I32, I32, PTR]),
    "dso_group_connect": (I32, [PTR, PTR, I32, I32, PTR]),
    "dso_group_destroy": (None, [PTR]),
    "dso_group_send": (I32, [PTR, PTR, I64]),
    "dso_group_receive": (I32, [PTR, PTR, I64]),
    "dso_group_lose": (I32, [PTR, I32]),
    "dso_group_lost": (I32, [PTR]),
    "dso_topology": (I32, [PTR, I32]),
    "dso_usable_cpus": (I32, []),
    "dso_default_threads": (I32, []),
    "dso_attend": (I32, [PTR, PTR]),
    "dso_read_bandwidth": (I32, [PTR, I64, C.c_double, PTR]),
    "dso_read_bandwidth_of": (I32, [PTR, PTR, PTR, I32, C.c_double, PTR]),
    "dso_mapping_add": (I32, [PTR, I64, I32, I64, C.c_char_p, PTR]),
    "dso_mapping_remove": (None, [I64]),
    "dso_mapping_check": (I32, [PTR]),
    "dso_tile_bytes": (I64, [I32]),
    "dso_packed_bytes": (I64, [I32, I64, I64]),
    "dso_pack": (I32, [PTR, I32, I32, PTR, I64, I64, I64, PTR, PTR]),
    "dso_pack_fp8": (I32, [PTR, PTR, PTR, I64, I64, I64, PTR]),
    "dso_unpack": (I32, [PTR, PTR, I64, I64, PTR]),
    "dso_linear": (I32, [PTR, PTR, PTR, I32, PTR, I64, I64, PTR]),
    "dso_linear_rows": (I32, [PTR, PTR, PTR, I32, PTR, I64, I64, PTR]),
    "dso_run_feed_forward": (I32, [PTR, PTR, PTR, I64, PTR]),
    "dso_norm": (I32, [PTR, PTR, I64, I64, PTR, PTR, C.c_float, PTR]),
    "dso_row_bytes": (I64, [I32, I64]),
    "dso_convert": (I32, [PTR, I32, PTR, I64, I64, PTR]),
    "dso_cache_block_bytes": (I64, [PTR]),
    "dso_cache_create": (I32, [PTR, I64, PTR]),
    "dso_cache_destroy": (None, [PTR]),
    "dso_cache_copy_block": (I32, [PTR, I32, I32]),
    "dso_cache_release": (I32, [PTR, I32]),
    "dso_cache_saved_bytes": (I64, [PTR]),
    "dso_cache_save_block": (I32, [PTR, I32, PTR]),
    "dso_cache_load_block": (I32, [PTR, I32, PTR]),
    "dso_cache_read": (I32, [PTR, I32, PTR, I32, PTR, PTR]),
    "dso_cache_rotate": (I32, [PTR, PTR, PTR, PTR, I32, PTR, I32, I32, I32]),
    "dso_states_slot_bytes": (I64, [PTR, I32]),
    "dso_states_create": (I32, [PTR, I32, I64, PTR]),
    "dso_states_destroy": (None, [PTR]),
    "dso_states_copy": (I32, [PTR, I32, I32]),
    "dso_states_release": (I32, [PTR, I32]),
    "dso_states_save": (I32, [PTR, I32, PTR]),
    "dso_states_load": (I32, [PTR, I32, PTR]),
    "dso_adapters_create": (I32, [PTR, I32, I32, I32, PTR]),
    "dso_adapters_destroy": (None, [PTR]),
    "dso_adapters_set": (I32, [PTR, I32, I32, PTR, PTR]),
    "dso_plan_create": (I32, [PTR, PTR, I32, PTR, I32, PTR, I32, I32, PTR]),
    "dso_plan_destroy": (None, [PTR]),
    "dso_plan_buffer_bytes": (I64, [PTR, I32, I32]),
    "dso_plan_reserve": (I32, [PTR, I32, I32]),
    "dso_plan_run": (I32, [PTR, PTR]),
    "dso_plan_check_batch": (I32, [PTR, PTR]),
    "dso_plan_decode": (I32, [PTR, PTR, PTR]),
    "dso_plan_decode_stages": (I32, [PTR, PTR, PTR, PTR]),
    "dso_plan_follow": (I32, [PTR, PTR, I32]),
    "dso_plan_decode_drafted": (I32, [PTR, PTR, PTR, PTR, PTR]),
    "dso_choose": (I32, [PTR, PTR, I32, PTR, I32, PTR, PTR]),
    "dso_plan_check": (I32, [PTR]),
    "dso_plan_counts": (I32, [PTR, PTR]),
    "dso_plan_set_timing": (I32, [PTR, I32]),
    "dso_plan_timing": (I32, [PTR, PTR, PTR]),
}


def library_path() -> Path:
    """The path at which the wheel (or `make native`) installs the shared library."""
    ending = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    return Path(__file__).resolve().parents[2] / "_native" / f"libdso.{ending}"


def unavailable_reason() -> str | None:
    """None if the native backend can be used; otherwise the reason and the remedy."""
    try:
        library()
    except BackendError as error:
        return str(error)
    return None


@functools.lru_cache(maxsize=1)
def library() -> Any:
    """The loaded library with typed functions. Raises BackendError if it was not built or has another version."""
    path = library_path()
    if not path.exists():
        raise BackendError(
            "the native CPU library was not built on this machine (no C++ compiler at install time, or not Linux on x86-64 or "
            'ARM64); install g++ and reinstall, or use backend="reference"'
        )
    try:
        lib = C.CDLL(str(path))
    except OSError as error:
        raise BackendError(f"{path} cannot be loaded ({error}); reinstall deepseek-optimizer") from error
    for name, (result, arguments) in (_SIGNATURES | native_train.SIGNATURES).items():
        function = getattr(lib, name, None)
        if function is None:
            raise BackendError(f"{path} lacks {name}: it belongs to another version; reinstall deepseek-optimizer")
        function.restype, function.argtypes = result, arguments
    if lib.dso_abi_version() != ABI_VERSION:
        raise BackendError(
            f"{path} has ABI {lib.dso_abi_version()}, this package needs {ABI_VERSION}; reinstall deepseek-optimizer"
        )
    return lib


_MEMORY_REMEDY = "close other programs, set a smaller kv_cache_memory, or load the model in a smaller format"


def check(code: int) -> None:
    """Raises the exception for a non-zero return code, with the library's message."""
    if code == 0:
        return
    message = library().dso_last_error().decode(errors="replace")
    if code == _EINVAL:
        raise ValueError(message)
    if code == _ENOMEM:
        raise NotEnoughMemoryError(message, None, None, _MEMORY_REMEDY)
    if code == _EFILE:
        what, _, file = message.partition(": ")
        raise CheckpointChangedError(what, file=file)
    if code == _ELOST:
        raise RankLostError(message)
    raise BackendError(message)


def number(result: int) -> int:
    """Returns a number of bytes or threads; raises the exception for a negative one, which is minus an error's code."""
    check(max(-result, 0))
    return result


class Handle:
    """An object of the library, usable as an argument of its functions; destroyed when this object is.

    Args:
        create, destroy: the library's functions; `create` takes `arguments` and the address for the pointer.
        arguments: passed to `create`.
    """

    def __init__(self, create: Any, destroy: Any, *arguments: Any) -> None:
        self._as_parameter_ = PTR()
        check(create(*arguments, C.byref(self._as_parameter_)))
        self._destroy = destroy

    @property
    def address(self) -> int | None:
        return self._as_parameter_.value

    def __copy__(self) -> Handle:
        return self  # a second handle would destroy the same object again

    def __del__(self) -> None:
        if "_destroy" in self.__dict__:
            self._destroy(self._as_parameter_)


class Context:
    """An ISA's kernels and a thread pool. Several plans may share one; runs on it are serialized. With DSO_CHECK=1 all outputs
    of the library have red zones, which are checked after each call.

    Args:
        isa: a name from `isa_names()`, or None for the best that runs on this machine.
        threads: None or <= 0: one per core, as far as CPU affinity and cgroup limits allow.
        cpus: place threads and memory as on a machine with these CPUs (`topology`); None: this machine's.
        nodes: a value of NODES: what happens if the threads are on several memory nodes.

    Raises:
        BackendError: the library is not available, or the ISA cannot run on this machine.
    """

    def __init__(
        self, isa: str | None = None, threads: int | None = None, cpus: Sequence[Cpu] | None = None, nodes: int = 1
    ) -> None:
        self.lib = library()
        name = isa.encode() if isa else None
        machine = None if cpus is None else (NativeCpu * len(cpus))(*(NativeCpu(*cpu) for cpu in cpus))
        self.handle = Handle(
            self.lib.dso_context_create_on, self.lib.dso_context_destroy, name, threads or 0, machine, len(cpus or ()), nodes
        )
        self.outputs = Outputs(checking())
        self.kept_rows = KeptRows()
        if self.outputs.checked:
            check(self.lib.dso_context_set_checked(self.handle, 1))

    def call(self, name: str, *arguments: Any, **written: torch.Tensor | None) -> None:
        """Calls a function of the library.

        Args:
            name: the function.
            arguments: all of its arguments; addresses come from `buffers`.
            written: its output tensors by name, to check their red zones.

        Raises: as `check`; BackendError if a red zone was overwritten.
        """
        check(getattr(self.lib, name)(*arguments))
        if self.outputs.checked:
            self.outputs.verify(name, written)

    @property
    def isa(self) -> str:
        return str(self.lib.dso_context_isa(self.handle).decode())

    @property
    def threads(self) -> int:
        return int(self.lib.dso_context_threads(self.handle))

    @property
    def nodes(self) -> list[int]:
        """The number of threads on each memory node."""
        counts = (I32 * self.threads)()
        nodes = self.lib.dso_context_nodes(self.handle, counts, len(counts))
        return counts[:nodes]

    def read_bandwidth(self, size: int, seconds: float) -> float:
        """Memory bandwidth in bytes per second: all threads together read `size` bytes (at least 1 MiB) repeatedly; the fastest
        round within `seconds` counts. Raises ValueError, MemoryError."""
        bandwidth = C.c_double()
        check(self.lib.dso_read_bandwidth(self.handle, size, seconds, C.byref(bandwidth)))
        return bandwidth.value

    def read_bandwidth_of(self, regions: Sequence[tuple[int, int]], seconds: float) -> float:
        """As `read_bandwidth`, of existing memory: (address, bytes) of each region, which must stay valid during the call."""
        starts = (C.c_void_p * len(regions))(*(start for start, _ in regions))
        sizes = (C.c_int64 * len(regions))(*(size for _, size in regions))
        bandwidth = C.c_double()
        check(self.lib.dso_read_bandwidth_of(self.handle, starts, sizes, len(regions), seconds, C.byref(bandwidth)))
        return bandwidth.value


def shared_context(isa: str | None, threads: int | None) -> Context:
    """The process's context for these settings, DSO_TOPOLOGY and DSO_NUMA: models with equal settings share one pool. None: as
    for `Context`. Raises ConfigError for an invalid variable."""
    machine, nodes = topology_file(), NODES[memory_nodes()]
    return _shared_context(isa, threads or (0 if machine else default_threads()), machine, nodes)


@functools.cache
def default_threads() -> int:
    """As many threads as cores that this process may use, within the control group's quota. Raises BackendError.

    Read once: the limits are in many files, and operations of training ask for their context at each call.
    """
    return number(library().dso_default_threads())


@functools.lru_cache(maxsize=8)
def _shared_context(isa: str | None, threads: int, machine: str | None, nodes: int) -> Context:
    return Context(isa, threads, read_topology(machine) if machine else None, nodes)


def context_of_rank(isa: str | None, threads: int | None, rank: int, ranks: int) -> Context:
    """A context of one of several processes that divide a model, for DSO_TOPOLOGY and DSO_NUMA; the calling thread is on the
    process's CPUs (`cpus_of_rank`). Raises ConfigError for an invalid variable."""
    file, nodes = topology_file(), NODES[memory_nodes()]
    machine = read_topology(file) if file else None
    if machine is not None and nodes != NODES["off"]:
        machine = cpus_of_rank(machine, rank, ranks) or machine
    return Context(isa, threads, machine, nodes)


def machine_cpus() -> list[Cpu]:
    """The CPUs of this machine that this process may use."""
    count = number(library().dso_topology(None, 0))
    cpus = (NativeCpu * count)()
    count = min(count, number(library().dso_topology(cpus, count)))
    return [Cpu(*(getattr(cpu, field) for field in Cpu._fields)) for cpu in cpus[:count]]


def _kv_type(kv_dtype: str) -> int:
    if kv_dtype not in KV_TYPES:
        raise BackendError(
            f"the cpu backend does not support KV cache dtype {kv_dtype!r}; choose kv_cache among {', '.join(KV_TYPES)}, or "
            "another backend"
        )
    return KV_TYPES[kv_dtype]


def cache_shape(spec: CacheSpec | LatentSpec | RowsSpec, kv_dtype: str) -> CacheShape:
    """The library's description of a cache with this spec."""
    if isinstance(spec, LatentSpec):
        return CacheShape(_kv_type(kv_dtype), spec.layers, 0, 0, spec.rank, spec.rope, spec.index, spec.summaries)
    groups = (I32 * spec.layers)(*map(spec.group_of, range(spec.layers)))
    if isinstance(spec, RowsSpec):
        rows = (I32 * (3 * spec.layers))(*(n for kind in spec.rows for n in (kind.width, kind.every, kind.rounded)))
        return CacheShape(_kv_type(kv_dtype), spec.layers, 0, 0, 0, 0, 0, 0, None, groups, 0, None, rows)
    if isinstance(spec.kv_heads, int) and isinstance(spec.head_dim, int):
        sizes, heads = (spec.kv_heads, spec.head_dim), None
    else:
        sizes, heads = (0, 0), (I32 * (2 * spec.layers))(*(size for layer in spec.heads for size in layer))
    copies = (I32 * spec.layers)(*spec.newest_groups) if spec.newest else None
    kind = _kv_type(kv_dtype)
    return CacheShape(kind, spec.layers, *sizes, 0, 0, 0, spec.summaries, heads, groups, spec.newest, copies)


def block_bytes(spec: CacheSpec | LatentSpec | RowsSpec, kv_dtype: str) -> int:
    """Bytes of a block of 32 tokens of the largest group of layers. Raises ValueError for an invalid shape."""
    return number(library().dso_cache_block_bytes(C.byref(cache_shape(spec, kv_dtype))))


def state_shapes(specs: Sequence[StateSpec]) -> Any:
    """The library's descriptions of recurrent states, as an array."""
    shapes = [(1,) * (3 - len(spec.shape)) + spec.shape for spec in specs]
    return (StateShape * len(shapes))(*(StateShape(*shape) for shape in shapes))


def state_bytes(specs: Sequence[StateSpec]) -> int:
    """Bytes of a slot with these recurrent states. Raises ValueError for an invalid shape."""
    if not specs:
        return 0
    return number(library().dso_states_slot_bytes(state_shapes(specs), len(specs)))


def isa_names() -> list[str]:
    """The ISA variants that this library was built with, best last."""
    lib = library()
    return [lib.dso_isa_name(i).decode() for i in range(lib.dso_isa_count())]


def isa_runs_here(name: str) -> bool:
    return bool(library().dso_isa_runs_here(name.encode()) == 1)


def cpu_description() -> dict[str, Any]:
    """The CPU's vendor, model name, detected features, caches and cores."""
    described = library().dso_cpu_description()
    if described is None:
        check(_ENOMEM)
    description: dict[str, Any] = json.loads(described.decode())
    return description
