"""Machines with a given amount of memory."""

from __future__ import annotations

from deepseek_optimizer.system.memory import FreeMemory, Limit


def memory_of(free: int, *limits: Limit) -> FreeMemory:
    """A machine with `free` bytes, which is also its total memory, and further limits."""
    return FreeMemory((Limit("machine", "this machine", "memory", free, free), *limits))
