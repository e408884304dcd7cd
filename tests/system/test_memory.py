"""Every source of the system's memory limits, alone and together."""

from __future__ import annotations

import resource
import sys

import pytest

from deepseek_optimizer.system.memory import RESERVE_BYTES, free_memory, less_reserve
from support import warm_python

MEMINFO = {"/proc/meminfo": "MemTotal:    16000 kB\nMemFree:   1000 kB\nMemAvailable:    9000 kB\nSwapFree:   90000 kB\n"}
MACHINE = 9000 << 10
V2_MOUNT = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"


def v2(folder, limit, used, files="", **more):
    """The files of a group; `more`: further files by name, such as `high="..."`."""
    base = f"/sys/fs/cgroup{folder}"
    given = {"memory.max": limit, "memory.current": used, "memory.stat": files} | {f"memory.{k}": v for k, v in more.items()}
    return {f"{base}/{name}": str(text) for name, text in given.items()}


def v1(folder, limit, used, stat="", mount="/sys/fs/cgroup/memory"):
    base = f"{mount}{folder}"
    files = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}
    return {f"{base}/{name}": str(text) for name, text in files.items()}


def test_the_machine_alone(tree):
    actual = free_memory(tree(MEMINFO))
    assert actual.free == MACHINE  # swap is not counted
    assert str(actual) == "this machine has 16 MB, of which 9 MB are free"
    assert actual.to_reserve is None


def test_this_machine():
    assert 0 < free_memory().free < free_memory().limits[0].total


@pytest.mark.parametrize("mountinfo", [V2_MOUNT, None], ids=["mountinfo", "no mountinfo"])
@pytest.mark.parametrize("tight", ["", "/pod", "/pod/box"])
def test_the_tightest_of_nested_groups_applies(tree, tight, mountinfo):
    files = {**MEMINFO, "/proc/self/cgroup": "0::/pod/box\n"}
    files |= {} if mountinfo is None else {"/proc/self/mountinfo": mountinfo}
    for folder in ("", "/pod", "/pod/box"):
        files |= v2(folder, 5_000_000 if folder == tight else "max", 1_000_000)
    actual = free_memory(tree(files))
    assert actual.free == 4_000_000
    assert str(actual) == f"the cgroup {tight or '/'} limits memory to 5 MB, of which 4 MB are free"


def test_memory_high_is_a_limit(tree):
    files = {**MEMINFO, "/proc/self/cgroup": "0::/box\n", **v2("/box", 5_000_000, 1_000_000, high="3000000")}
    assert free_memory(tree(files)).free == 2_000_000


def test_no_limits_and_limits_above_the_machine(tree):
    files = {**MEMINFO, "/proc/self/cgroup": "0::/pod/box\n", **v2("/pod/box", "max", 1000), **v2("/pod", 1 << 50, 1000)}
    actual = free_memory(tree(files))
    assert actual.free == MACHINE and actual.tightest.kind == "machine"


def test_more_is_used_than_allowed(tree):
    assert free_memory(tree({**MEMINFO, "/proc/self/cgroup": "0::/\n", **v2("", 5000, 6000)})).free == 0


def test_file_cache_counts_as_free_but_not_what_this_process_has_mapped(tree):
    stat = "anon 3000000\nfile 2000000\ninactive_file 1500000\nactive_file 500000\nfile_mapped 0\n"
    files = {**MEMINFO, "/proc/self/cgroup": "0::/box\n", **v2("/box", 8_000_000, 5_000_000, stat)}
    assert free_memory(tree(files)).free == 5_000_000
    mapped = {"/proc/self/status": "Name: x\nVmRSS:  900 kB\nRssFile:\t 500 kB\n"}
    actual = free_memory(tree({**files, **mapped}))
    assert actual.free == 5_000_000 - (500 << 10)
    assert actual.limits[0].free == MACHINE - (500 << 10)


def test_the_usage_of_a_group_cannot_be_read(tree):
    files = {**MEMINFO, "/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": "5000000"}
    files |= {"/proc/self/status": "VmRSS:  1000 kB\n"}
    assert free_memory(tree(files)).free == 5_000_000 - (1000 << 10)


def test_v1_with_its_own_names(tree):
    stat = "inactive_file 1\nactive_file 1\ntotal_inactive_file 200000\ntotal_active_file 100000\n"
    files = {
        **MEMINFO, "/proc/self/cgroup": "9:cpu,cpuacct:/other\n4:memory:/box\n", "/proc/self/mountinfo": V1_MOUNT,
        **v1("/box", 5_000_000, 1_000_000, stat),
    }  # fmt: skip
    assert free_memory(tree(files)).free == 4_300_000


def test_v1_writes_no_limit_as_a_number(tree):
    files = {**MEMINFO, "/proc/self/cgroup": "4:memory:/box\n", **v1("/box", 9223372036854771712, 1)}
    assert free_memory(tree(files)).free == MACHINE


def test_v1_reports_limits_of_invisible_parents(tree):
    """In a container the mount begins at its own group; a pod's limit above it appears only in memory.stat."""
    mount = V1_MOUNT.replace(" / ", " /kube/pod/box ", 1)
    stat = f"hierarchical_memory_limit {3_000_000}\n"
    files = {
        **MEMINFO, "/proc/self/cgroup": "4:memory:/kube/pod/box\n", "/proc/self/mountinfo": mount,
        **v1("", 9223372036854771712, 1_000_000, stat),
    }  # fmt: skip
    actual = free_memory(tree(files))
    assert actual.free == 2_000_000 and "cgroup /kube/pod/box " in str(actual)


def test_hybrid_mounts(tree):
    """The memory controller is in v1, and there is also a v2 tree; both are read."""
    v2_mount = V2_MOUNT.replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified ")
    files = {
        **MEMINFO, "/proc/self/cgroup": "4:memory:/box\n0::/box\n", "/proc/self/mountinfo": V1_MOUNT + v2_mount,
        **v1("/box", 5_000_000, 1_000_000),
    }  # fmt: skip
    assert free_memory(tree(files)).free == 4_000_000
    unified = {path.replace("/cgroup/", "/cgroup/unified/"): text for path, text in v2("/box", 2_000_000, 0).items()}
    assert free_memory(tree({**files, **unified})).free == 2_000_000


def test_hierarchies_mounted_elsewhere(tree):
    mount = V1_MOUNT.replace("/sys/fs/cgroup/memory", "/mnt/my\\040groups")
    files = {
        **MEMINFO, "/proc/self/cgroup": "4:memory:/box\n", "/proc/self/mountinfo": mount,
        **v1("/box", 5_000_000, 0, mount="/mnt/my groups"),
    }  # fmt: skip
    assert free_memory(tree(files)).free == 5_000_000


@pytest.mark.parametrize(
    ("path", "mounted"), [("/", "/"), ("/../..", "/"), ("/../other", "/"), ("/", "/../.."), ("/host/path", "/docker/abc")]
)
def test_namespaces(tree, path, mounted):
    """The path ends at, or outside, the mount: the mount's root is the nearest visible group."""
    mount = V2_MOUNT.replace(" / ", f" {mounted} ", 1)
    files = {**MEMINFO, "/proc/self/cgroup": f"0::{path}\n", "/proc/self/mountinfo": mount, **v2("", 5_000_000, 1_000_000)}
    assert free_memory(tree(files)).free == 4_000_000


def test_a_tree_mounted_from_above_the_container(tree):
    mount = V2_MOUNT.replace(" / ", " /docker ", 1)
    files = {
        **MEMINFO, "/proc/self/cgroup": "0::/docker/abc/sub\n", "/proc/self/mountinfo": mount,
        **v2("/abc", 5_000_000, 1_000_000),
    }  # fmt: skip
    assert str(free_memory(tree(files))).startswith("the cgroup /docker/abc limits")


LIMITS = """Limit                     Soft Limit           Hard Limit           Units
Max file size             1000                 unlimited            bytes
Max data size             {data}                 unlimited            bytes
Max address space         {space}            unlimited            bytes
"""


@pytest.mark.parametrize(
    ("data", "space", "free", "says"),
    [
        ("unlimited", 5 << 20, (5 << 20) - (1000 << 10), "ulimit -v limits address space"),
        (4 << 20, "unlimited", (4 << 20) - (500 << 10), "ulimit -d limits data"),
        (1000, 5 << 20, 0, "ulimit -d limits data"),
        ("unlimited", "unlimited", MACHINE, "this machine has"),
    ],
)
def test_ulimits(tree, data, space, free, says):
    status = {"/proc/self/status": "VmSize:  1000 kB\nVmData:  500 kB\n"}
    actual = free_memory(tree({**MEMINFO, **status, "/proc/self/limits": LIMITS.format(data=data, space=space)}))
    assert actual.free == free and str(actual).startswith(says)
    assert actual.to_use.free == MACHINE  # they limit new reservations, not the use of earlier ones


def test_strict_overcommit(tree):
    meminfo = MEMINFO["/proc/meminfo"] + "CommitLimit:   5000 kB\nCommitted_AS:   4000 kB\n"
    files = {"/proc/meminfo": meminfo, "/proc/sys/vm/overcommit_memory": "0\n"}
    assert free_memory(tree(files)).free == MACHINE
    actual = free_memory(tree({**files, "/proc/sys/vm/overcommit_memory": "2\n"}))
    assert actual.free == 1000 << 10 and actual.to_use.free == MACHINE


def test_nothing_can_be_read(tree):
    assert free_memory(tree({})).tightest.kind == "machine"


_CHILD = """
import resource
from deepseek_optimizer.system.memory import free_memory
resource.setrlimit(resource.RLIMIT_AS, (1 << 32, resource.RLIM_INFINITY))
print(free_memory().to_reserve)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/self/limits")
def test_a_limit_of_this_kernel():
    assert resource.getrlimit(resource.RLIMIT_AS)
    done = warm_python.run(_CHILD)
    assert done.stdout.startswith("ulimit -v limits address space to 4,295 MB"), done.stderr


def test_the_reserve():
    assert less_reserve(RESERVE_BYTES) == 0
    assert less_reserve(100 << 30) == 90 << 30
