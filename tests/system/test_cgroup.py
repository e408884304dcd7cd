"""CPU limits of control groups."""

from __future__ import annotations

import pytest

from deepseek_optimizer.system.cgroup import cpu_quota, throttled_periods

V1 = {"/proc/self/cgroup": "3:cpuacct,cpu:/box\n2:memory:/box\n0::/\n"}


@pytest.mark.parametrize("folder", ["cpu", "cpu,cpuacct"])
def test_quota_of_cgroup_v1(tree, folder):
    base = f"/sys/fs/cgroup/{folder}/box"
    assert cpu_quota(tree({**V1, f"{base}/cpu.cfs_quota_us": "50000", f"{base}/cpu.cfs_period_us": "100000"})) == 0.5


def test_no_quota_in_cgroup_v1(tree):
    base = "/sys/fs/cgroup/cpu/box"
    assert cpu_quota(tree({**V1, f"{base}/cpu.cfs_quota_us": "-1", f"{base}/cpu.cfs_period_us": "100000"})) is None


def test_the_tightest_quota_of_nested_groups(tree):
    files = {"/proc/self/cgroup": "0::/pod/box\n", "/sys/fs/cgroup/pod/cpu.max": "200000 100000"}
    assert cpu_quota(tree({**files, "/sys/fs/cgroup/pod/box/cpu.max": "max 100000"})) == 2
    assert cpu_quota(tree({**files, "/sys/fs/cgroup/pod/box/cpu.max": "150000 100000"})) == 1.5


def test_throttled_periods(tree):
    files = {"/proc/self/cgroup": "0::/pod/box\n", "/sys/fs/cgroup/pod/box/cpu.stat": "nr_periods 90\nnr_throttled 17\n"}
    assert throttled_periods(tree(files)) == 17
    assert throttled_periods(tree({"/proc/self/cgroup": "0::/\n"})) == 0
