"""Limits that a container or a service puts on this process: cgroup v2 and v1, on any level above it."""

from __future__ import annotations

from collections.abc import Iterator

from .machine import Machine

_NO_LIMIT = 1 << 60  # v1 writes "no limit" as a number near 2^63


def cpu_quota(machine: Machine) -> float | None:
    """Processors' worth of time that this process may use; None without a limit."""
    quotas = []
    for folder, v2 in _folders(machine, "cpu"):
        if v2:
            words = (machine.read(f"{folder}/cpu.max") or "").split()
        else:
            words = [machine.read(f"{folder}/cpu.cfs_{name}_us") or "" for name in ("quota", "period")]
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]):  # "max" and -1 are no limits
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def throttled_periods(machine: Machine) -> int:
    """How often the quota stopped this group, since it was made."""
    counts = [0]
    for folder, _ in _folders(machine, "cpu"):
        for line in (machine.read(f"{folder}/cpu.stat") or "").splitlines():
            name, _, value = line.partition(" ")
            if name == "nr_throttled" and value.strip().isdigit():
                counts.append(int(value))
    return max(counts)


def memory_left(machine: Machine) -> int | None:
    """Bytes that the tightest limit leaves; None without a limit."""
    left = []
    for folder, v2 in _folders(machine, "memory"):
        names = ("memory.max", "memory.current") if v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, used = (machine.read(f"{folder}/{name}") or "" for name in names)
        if limit.isdigit() and used.isdigit() and int(limit) < _NO_LIMIT:
            left.append(max(0, int(limit) - int(used)))
    return min(left, default=None)


def _folders(machine: Machine, controller: str) -> Iterator[tuple[str, bool]]:
    """(folder, whether it is v2) for this process's group and every one above.

    In a container the path may be the host's; the walk up to the mounted root finds the limit all the same.
    """
    for line in (machine.read("/proc/self/cgroup") or "").splitlines():  # "id:controllers:path"; v2 is "0::path"
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        parts = [part for part in path.split("/") if part and part != ".."]
        mounts = [""] if not controllers else [controller, "cpu,cpuacct"] if controller == "cpu" else [controller]
        for mount in mounts:
            for depth in range(len(parts), -1, -1):
                yield "/".join(filter(None, ["/sys/fs/cgroup", mount, *parts[:depth]])), not controllers
