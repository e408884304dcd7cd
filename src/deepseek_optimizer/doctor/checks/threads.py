"""Whether the number of threads matches the CPUs available: affinity, cgroup quota, hyper-threads."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ...backends.cpu.environment import forced_threads
from ...errors import ConfigError
from ...system.cgroup import cpu_quota, throttled_periods
from ..case import Case
from ..finding import Finding

NAME = "threads"


def check(case: Case) -> Iterator[Finding]:
    """Too many threads wait for each other in every step; too few leave bandwidth unused."""
    machine, quota = case.machine, cpu_quota(case.machine.root)
    usable = machine.usable_cpus
    limit = usable if quota is None else min(usable, math.ceil(quota))
    usual = min(limit, machine.usable_cores or limit)
    try:
        threads = case.fields.get("threads") or forced_threads() or usual
    except ConfigError as error:
        yield Finding(NAME, "error", "DSO_THREADS is not a valid number of threads", str(error), "correct or unset DSO_THREADS")
        return
    facts = {
        "threads": threads, "usable_cpus": usable, "online_cpus": machine.online_cpus, "usable_cores": machine.usable_cores,
        "cgroup_cpus": quota, "throttled_periods": throttled_periods(machine.root),
    }  # fmt: skip
    findings = list(_findings(case, threads, limit, usual, quota, facts))
    if not any(f.severity == "warning" for f in findings):
        findings.insert(0, Finding(NAME, "ok", f"{threads} threads on {limit} usable CPUs", facts=facts))
    yield from findings


def _findings(
    case: Case, threads: int, limit: int, usual: int, quota: float | None, facts: dict[str, object]
) -> Iterator[Finding]:
    machine, usable = case.machine, case.machine.usable_cpus
    if threads > usable:
        yield Finding(
            NAME, "warning", f"{threads} threads share {usable} CPUs",
            "a step ends with its last thread, and threads without a CPU of their own wait to be scheduled",
            f"remove threads and DSO_THREADS, or set them to {limit}", facts,
        )  # fmt: skip
    elif threads > limit:
        yield Finding(
            NAME, "warning", f"{threads} threads, but the cgroup allows {quota:g} CPUs",
            "the kernel stops the whole process for the rest of each period once its quota is used up",
            f"set threads to {limit}; or raise the quota (docker run --cpus, resources.limits.cpu)", facts,
        )  # fmt: skip
    elif threads < usual:
        yield Finding(
            NAME, "note", f"{threads} threads leave {usual - threads} of {usual} usable cores idle",
            "threads or DSO_THREADS is set to this number", "remove both settings to use all cores", facts,
        )  # fmt: skip
    if throttled_periods(machine.root):
        yield Finding(
            NAME, "warning", f"the cgroup's CPU quota has throttled this container {throttled_periods(machine.root)} times",
            f"it allows {quota:g} CPUs" if quota else "a parent group has a quota",
            "raise the quota to whole CPUs, or use fewer threads", facts,
        )  # fmt: skip
    if usable < machine.online_cpus:
        yield Finding(
            NAME, "note", f"this process may run on {usable} of {machine.online_cpus} CPUs",
            "an affinity mask (taskset, cpuset, numactl, a batch system, OMP_PROC_BIND)",
            "widen it if the other CPUs are free", facts,
        )  # fmt: skip
    cores = machine.usable_cores
    if cores and cores < threads <= limit:
        yield Finding(
            NAME, "note", f"{threads} threads on {cores} cores: some are hyper-threads of the same core",
            "two threads of a core share its vector units and its memory bandwidth",
            f"measure with threads={cores}, and use the faster setting", facts,
        )  # fmt: skip
