"""The control groups (v1 and v2) of this process, and their CPU quotas.

/proc/self/cgroup has this process's path in each hierarchy; /proc/self/mountinfo has the mount point of each hierarchy and the
group at the root of the mount. Both are relative to this process's cgroup namespace.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .files import read_text

_MOUNTS_V2 = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")  # conventional mount points, used if mountinfo cannot be read


@dataclass(frozen=True)
class ControlGroup:
    """A control group.

    Attributes:
        name: path of the group, such as `/system.slice/x.service`.
        folder: directory of its files, below the root.
        v2: whether it belongs to the unified hierarchy.
    """

    name: str
    folder: str
    v2: bool


@dataclass(frozen=True)
class _Mount:
    """A mounted hierarchy.

    Attributes:
        root: the group at the root of the mount.
        folder: the mount point.
    """

    root: str
    folder: str


def groups(root: Path, controller: str) -> Iterator[ControlGroup]:
    """Yields this process's group for a controller and all visible ancestors, starting with the innermost.

    If the process's path is not below the root of a mount, that root is the nearest visible group. This is the case for a path
    like `/../x` of a process that was put into a cgroup namespace from outside, or if the hierarchy is mounted from above the
    namespace's root.

    Args:
        root: directory with the system's files.
        controller: name of the controller, such as "memory" or "cpu".
    """
    for line in read_text(root, "/proc/self/cgroup").splitlines():  # "id:controllers:path"; v2 is "0::path"
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        for mount in _mounts(root, controller if controllers else None):
            base, own = _parts(mount.root), _parts(path)
            inside = own[: len(base)] == base and ".." not in own
            own = own if inside else base
            for depth in range(len(own), len(base) - 1, -1):
                folder = "/".join([mount.folder.rstrip("/"), *own[len(base) : depth]])
                yield ControlGroup("/" + "/".join(own[:depth]), folder, not controllers)


def _mounts(root: Path, controller: str | None) -> list[_Mount]:
    """Returns the mounts of a v1 controller's hierarchy, or for None of the unified hierarchy."""
    mounts = []
    table = read_text(root, "/proc/self/mountinfo")
    for line in table.splitlines():  # "36 35 98:0 ROOT FOLDER OPTIONS [more] - TYPE SOURCE SUPER_OPTIONS"
        mount, _, filesystem = line.partition(" - ")
        fields, kind = mount.split(), filesystem.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup2" if controller is None else kind[0] == "cgroup" and controller in kind[2].split(","):
            mounts.append(_Mount(_unescaped(fields[3]), _unescaped(fields[4])))
    if table:
        return mounts
    folders = _MOUNTS_V2 if controller is None else [f"/sys/fs/cgroup/{controller}"]
    if controller == "cpu":
        folders = [*folders, "/sys/fs/cgroup/cpu,cpuacct"]
    return [_Mount("/", folder) for folder in folders]


def _unescaped(path: str) -> str:
    return path.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part]


def cpu_quota(root: Path) -> float | None:
    """Returns the CPU quota of this process in CPUs, the smallest of all its groups; None without a limit."""
    quotas = []
    for group in groups(root, "cpu"):
        if group.v2:
            words = read_text(root, f"{group.folder}/cpu.max").split()
        else:
            words = [read_text(root, f"{group.folder}/cpu.cfs_{name}_us") for name in ("quota", "period")]
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]):  # "max" and -1 mean no limit
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def throttled_periods(root: Path) -> int:
    """Returns the number of periods in which the quota throttled this process's group since its creation."""
    counts = [0]
    for group in groups(root, "cpu"):
        for line in read_text(root, f"{group.folder}/cpu.stat").splitlines():
            name, _, value = line.partition(" ")
            if name == "nr_throttled" and value.strip().isdigit():
                counts.append(int(value))
    return max(counts)
