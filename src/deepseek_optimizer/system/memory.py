"""How much memory this process can still take, and which limit says so: the machine, its control groups, `ulimit`.

What counts as free:

- Of the machine, MemAvailable: what can be had without swapping, which already leaves out what other processes hold.
- Of a control group, the limit less what its processes use, on every level above this process. memory.high counts as a limit:
  beyond it the kernel slows the group down instead of killing it.
- File cache counts as free, since the kernel gives it back before it kills anybody (in MemAvailable it is counted so). But not
  the files that this process has mapped: packed weights are among them, and without them each step reads the disk.
- Swap never counts.
- RLIMIT_AS, RLIMIT_DATA and the kernel's commit limit bound what is reserved, used or not.
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
_NO_LIMIT = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63

Kind = Literal["machine", "device", "cgroup", "reserved"]


@dataclass(frozen=True)
class Limit:
    """Attributes:
    kind: "reserved" bounds address space or what was promised, the others memory that is used.
    name: such as "the cgroup /system.slice/x".
    bounds: what it limits.
    total, free: bytes that it allows, and those of them that are left.
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
    """All limits that were found, the machine's own among them."""

    limits: tuple[Limit, ...]

    @property
    def tightest(self) -> Limit:
        """The limit that leaves least."""
        return min(self.limits, key=lambda limit: limit.free)

    @property
    def free(self) -> int:
        """Bytes that can be taken anew."""
        return self.tightest.free

    @property
    def to_use(self) -> Limit:
        """The limit that leaves least to memory that was reserved before, and is to be used now."""
        return FreeMemory(tuple(limit for limit in self.limits if limit.kind != "reserved")).tightest

    @property
    def to_reserve(self) -> Limit | None:
        """The limit that leaves least to what is only reserved; None without one."""
        bounds = [limit for limit in self.limits if limit.kind == "reserved"]
        return min(bounds, key=lambda limit: limit.free, default=None)

    def __str__(self) -> str:
        return str(self.tightest)


def free_memory(root: Path = ROOT) -> FreeMemory:
    """The limits as they are now.

    Args:
        root: where the system's files lie.
    """
    own = read_sizes(root, "/proc/self/status")
    limits = [_machine(root, own), *cgroup_limits(root, own), *_ulimits(root, own), *_commit_limit(root)]
    return FreeMemory(tuple(limits))


def device_memory(device: torch.device) -> FreeMemory:
    """Memory of a device other than the CPU; the host's limits where torch cannot tell, or the device shares its memory."""
    import torch

    if device.type != "cuda":
        return free_memory()
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, to be used again
    return FreeMemory((Limit("device", str(device), "memory", total, free + cached),))


def less_reserve(free: int) -> int:
    """Of `free` bytes those that a cache may take; negative where there are fewer than the reserve."""
    return free - max(RESERVE_BYTES, int(free * RESERVE_SHARE))


def mb(size: int) -> str:
    """Bytes as people read them."""
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
    """The limits of all groups that this process is in.

    Args:
        own: sizes of /proc/self/status.
    """
    for group in groups(root, "memory"):
        total = _limit(root, group)
        if total is None:
            continue
        used = _number(root, f"{group.folder}/{'memory.current' if group.v2 else 'memory.usage_in_bytes'}")
        if used is None:
            used = own.get("VmRSS", 0)  # what is known of it
        stat, prefix = read_sizes(root, f"{group.folder}/memory.stat"), "" if group.v2 else "total_"
        files = stat.get(f"{prefix}active_file", 0) + stat.get(f"{prefix}inactive_file", 0)
        held = max(0, used - max(0, files - own.get("RssFile", 0)))
        yield Limit("cgroup", f"the cgroup {group.name}", "memory", total, max(0, total - held))


def _limit(root: Path, group: ControlGroup) -> int | None:
    if group.v2:
        found = [_number(root, f"{group.folder}/{name}") for name in ("memory.max", "memory.high")]
    else:  # in memory.stat is the smallest limit of all groups above, also of those that cannot be seen from here
        stat = read_sizes(root, f"{group.folder}/memory.stat")
        found = [_number(root, f"{group.folder}/memory.limit_in_bytes"), stat.get("hierarchical_memory_limit")]
    return min((size for size in found if size is not None and size < _NO_LIMIT), default=None)


def _number(root: Path, path: str) -> int | None:
    text = read_text(root, path)
    return int(text) if text.isdigit() else None  # "max" is no limit


def _ulimits(root: Path, own: dict[str, int]) -> Iterator[Limit]:
    """RLIMIT_AS and RLIMIT_DATA, the soft ones."""
    told = {"Max address space": ("ulimit -v", "address space", "VmSize"), "Max data size": ("ulimit -d", "data", "VmData")}
    for line in read_text(root, "/proc/self/limits").splitlines():  # "Max data size   SOFT   HARD   bytes"
        for name, (ulimit, bounds, used) in told.items():
            soft = line.removeprefix(name).split()[:1] if line.startswith(name) else []
            if soft and soft[0].isdigit():
                yield Limit("reserved", ulimit, bounds, int(soft[0]), max(0, int(soft[0]) - own.get(used, 0)))


def _commit_limit(root: Path) -> Iterator[Limit]:
    """Where the kernel promises no more than it has (vm.overcommit_memory=2)."""
    if read_text(root, "/proc/sys/vm/overcommit_memory") != "2":
        return
    sizes = read_sizes(root, "/proc/meminfo")
    if "CommitLimit" in sizes:
        total = sizes["CommitLimit"]
        free = max(0, total - sizes.get("Committed_AS", 0))
        yield Limit("reserved", "vm.overcommit_memory=2", "what is reserved", total, free)
