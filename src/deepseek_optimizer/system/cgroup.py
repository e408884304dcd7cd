"""Control groups, v1 and v2: those that this process is in, and what they allow of processors' time.

Files: /proc/self/cgroup has this process's path in each hierarchy, /proc/self/mountinfo where each is mounted, and which of its
groups is the root of that mount. Both are as seen from this process's cgroup namespace.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .files import read_text

_MOUNTS_V2 = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")  # where they lie by custom, if mountinfo can't be read


@dataclass(frozen=True)
class ControlGroup:
    """Attributes:
    name: its path, such as `/system.slice/x.service`.
    folder: of its files, below the root.
    v2: whether it is of the unified hierarchy.
    """

    name: str
    folder: str
    v2: bool


@dataclass(frozen=True)
class _Mount:
    """Attributes:
    root: the group at the mount's root.
    folder: where it is mounted.
    """

    root: str
    folder: str


def groups(root: Path, controller: str) -> Iterator[ControlGroup]:
    """This process's group for a controller and all above it that can be seen, from the innermost on.

    Where the process's path does not lie below the root of a mount, that root is the nearest group to be seen: `/../x` of a
    process that was put into a cgroup namespace from outside, or a tree that is mounted from above the namespace's root.
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
    """Where a v1 controller's hierarchy is mounted; None: the unified one."""
    found = []
    table = read_text(root, "/proc/self/mountinfo")
    for line in table.splitlines():  # "36 35 98:0 ROOT FOLDER OPTIONS [more] - TYPE SOURCE SUPER_OPTIONS"
        mount, _, filesystem = line.partition(" - ")
        fields, kind = mount.split(), filesystem.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup2" if controller is None else kind[0] == "cgroup" and controller in kind[2].split(","):
            found.append(_Mount(_unescaped(fields[3]), _unescaped(fields[4])))
    if table:
        return found
    folders = _MOUNTS_V2 if controller is None else [f"/sys/fs/cgroup/{controller}"]
    if controller == "cpu":
        folders = [*folders, "/sys/fs/cgroup/cpu,cpuacct"]
    return [_Mount("/", folder) for folder in folders]


def _unescaped(path: str) -> str:
    return path.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part]


def cpu_quota(root: Path) -> float | None:
    """Processors' worth of time that this process may use; None without a limit."""
    quotas = []
    for group in groups(root, "cpu"):
        if group.v2:
            words = read_text(root, f"{group.folder}/cpu.max").split()
        else:
            words = [read_text(root, f"{group.folder}/cpu.cfs_{name}_us") for name in ("quota", "period")]
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]):  # "max" and -1 are no limits
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def throttled_periods(root: Path) -> int:
    """How often the quota stopped this group, since it was made."""
    counts = [0]
    for group in groups(root, "cpu"):
        for line in read_text(root, f"{group.folder}/cpu.stat").splitlines():
            name, _, value = line.partition(" ")
            if name == "nr_throttled" and value.strip().isdigit():
                counts.append(int(value))
    return max(counts)
