"""The machine that a benchmark runs on: CPU name, usable cores, memory."""

from __future__ import annotations

from ..system.memory import free_memory
from ..system.processor import cpu_name, usable_cpus

__all__ = ["cpu_name", "machine_memory_bytes", "usable_cpus"]


def machine_memory_bytes() -> int:
    """Memory of the machine, or of the control group that limits this process to less."""
    return min(limit.total for limit in free_memory().limits if limit.kind != "reserved")
