"""The processor: its name, and how many of its cores this process may use."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from .arm_processors import arm_name
from .files import ROOT, read_text


def cpu_name(root: Path = ROOT) -> str:
    """The CPU's model name, or the designs of an ARM processor's cores; its architecture if the system does not report one.

    Args:
        root: directory with the system's files.
    """
    cpuinfo = read_text(root, "/proc/cpuinfo")
    for line in cpuinfo.splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return arm_name(cpuinfo) or platform.processor() or platform.machine()


def usable_cpus() -> int:
    """Number of CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
