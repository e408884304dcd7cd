"""The memory that this process can still allocate, and the limit that determines it: the machine, control groups, `ulimit`.

What counts as free:

- Of the machine: MemAvailable, the memory that is available without swapping; memory of other processes is excluded.
- Of a control group: its limit less the memory that its processes use, for the process's group and all its ancestors.
  memory.high counts as a limit: above it, the kernel slows the group down instead of killing processes.
- The file cache counts as free, as in MemAvailable, since the kernel reclaims it before it kills processes. Files that this
  process has mapped do not: they include packed weights, without which every step would read the disk.
- Swap does not count.
- RLIMIT_AS, RLIMIT_DATA and the kernel's commit limit apply to reserved memory, whether it is used or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .cgroup import ControlGroup, groups
from .files import ROOT, read_sizes, read_text

if TYPE_CHECKING:
    import torch

RESERVE_BYTES = 256 << 20
RESERVE_SHARE = 0.1
_NO_LIMIT = 1 << 60  # cgroup v1 represents "no limit" by a number near 2^63

Kind = Literal["machine", "device", "cgroup", "reserved"]


@dataclass(frozen=True)
class Limit:
    """A limit on memory.

    Attributes:
        kind: "reserved" for limits on address space or committed memory; the others limit used memory.
        name: name of the limit, such as "the cgroup /system.slice/x".
        bounds: what it limits.
        total, free: the limit, and how much of it is left, in bytes.
    """

    kind: Kind
    name: str
    bounds: str
    total: int
    free: int

    def __str__(self) -> str:
        has = f"{self.name} has" if self.kind in ("machine", "device") else f"{self.name} limits {self.bounds} to"
        return f"{has} {mb(self.total)}, of which {mb(self.free)} are free"


@dataclass(frozen=True)
class FreeMemory:
    """All limits that apply, including the machine's memory."""

    limits: tuple[Limit, ...]

    @property
    def tightest(self) -> Limit:
        """The limit with the least free memory."""
        return min(self.limits, key=lambda limit: limit.free)

    @property
    def free(self) -> int:
        """Number of bytes that can be allocated."""
        return self.tightest.free

    @property
    def to_use(self) -> Limit:
        """The tightest limit for using memory that is reserved already."""
        return FreeMemory(tuple(limit for limit in self.limits if limit.kind != "reserved")).tightest

    @property
    def to_reserve(self) -> Limit | None:
        """The tightest limit for reserving memory; None without one."""
        bounds = [limit for limit in self.limits if limit.kind == "reserved"]
        return min(bounds, key=lambda limit: limit.free, default=None)

    def __str__(self) -> str:
        return str(self.tightest)


def free_memory(root: Path = ROOT) -> FreeMemory:
    """Returns the current limits.

    Args:
        root: directory with the system's files.
    """
    own = read_sizes(root, "/proc/self/status")
    limits = [_machine(root, own), *cgroup_limits(root, own), *_ulimits(root, own), *_commit_limit(root)]
    return FreeMemory(tuple(limits))


def device_memory(device: torch.device) -> FreeMemory:
    """Returns the memory of a CUDA device; for others, which share host memory or are unknown to torch, the host's limits."""
    import torch

    if device.type != "cuda":
        return free_memory()
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # cached by torch, and reused
    return FreeMemory((Limit("device", str(device), "memory", total, free + cached),))


def less_reserve(free: int) -> int:
    """Returns how many of `free` bytes a cache may use, after a reserve; negative if there are fewer than the reserve."""
    return free - max(RESERVE_BYTES, int(free * RESERVE_SHARE))


def mb(size: int) -> str:
    """Formats a number of bytes as MB."""
    return f"{size / 1e6:,.0f} MB"


def _machine(root: Path, own: dict[str, int]) -> Limit:
    sizes = read_sizes(root, "/proc/meminfo")
    if "MemTotal" in sizes:
        total, available = sizes["MemTotal"], sizes.get("MemAvailable", sizes.get("MemFree", 0))
    else:  # not Linux
        import psutil

        memory = psutil.virtual_memory()
        total, available = int(memory.total), int(memory.available)
    return Limit("machine", "this machine", "memory", total, max(0, available - own.get("RssFile", 0)))


def cgroup_limits(root: Path, own: dict[str, int]) -> Iterator[Limit]:
    """Yields the memory limits of all groups that this process is in.

    Args:
        root: directory with the system's files.
        own: sizes from /proc/self/status.
    """
    for group in groups(root, "memory"):
        total = _limit(root, group)
        if total is None:
            continue
        used = _number(root, f"{group.folder}/{'memory.current' if group.v2 else 'memory.usage_in_bytes'}")
        if used is None:
            used = own.get("VmRSS", 0)  # the group's usage is unknown
        stat, prefix = read_sizes(root, f"{group.folder}/memory.stat"), "" if group.v2 else "total_"
        files = stat.get(f"{prefix}active_file", 0) + stat.get(f"{prefix}inactive_file", 0)
        occupied = max(0, used - max(0, files - own.get("RssFile", 0)))
        yield Limit("cgroup", f"the cgroup {group.name}", "memory", total, max(0, total - occupied))


def _limit(root: Path, group: ControlGroup) -> int | None:
    if group.v2:
        limits = [_number(root, f"{group.folder}/{name}") for name in ("memory.max", "memory.high")]
    else:  # memory.stat has the smallest limit of all ancestors, including those not visible from here
        stat = read_sizes(root, f"{group.folder}/memory.stat")
        limits = [_number(root, f"{group.folder}/memory.limit_in_bytes"), stat.get("hierarchical_memory_limit")]
    return min((size for size in limits if size is not None and size < _NO_LIMIT), default=None)


def _number(root: Path, path: str) -> int | None:
    text = read_text(root, path)
    return int(text) if text.isdigit() else None  # "max" means no limit


def _ulimits(root: Path, own: dict[str, int]) -> Iterator[Limit]:
    """Yields the soft limits RLIMIT_AS and RLIMIT_DATA."""
    rows = {"Max address space": ("ulimit -v", "address space", "VmSize"), "Max data size": ("ulimit -d", "data", "VmData")}
    for line in read_text(root, "/proc/self/limits").splitlines():  # "Max data size   SOFT   HARD   bytes"
        for name, (ulimit, bounds, used) in rows.items():
            soft = line.removeprefix(name).split()[:1] if line.startswith(name) else []
            if soft and soft[0].isdigit():
                yield Limit("reserved", ulimit, bounds, int(soft[0]), max(0, int(soft[0]) - own.get(used, 0)))


def _commit_limit(root: Path) -> Iterator[Limit]:
    """Yields the kernel's commit limit, if it does not overcommit memory (vm.overcommit_memory=2)."""
    if read_text(root, "/proc/sys/vm/overcommit_memory") != "2":
        return
    sizes = read_sizes(root, "/proc/meminfo")
    if "CommitLimit" in sizes:
        total = sizes["CommitLimit"]
        free = max(0, total - sizes.get("Committed_AS", 0))
        yield Limit("reserved", "vm.overcommit_memory=2", "reserved memory", total, free)
