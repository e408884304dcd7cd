"""What a process is on and what it took: CPU name, threads, peak memory."""

from __future__ import annotations

import os
import platform
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cpus() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class PeakMemory:
    """Peak resident memory above what was resident when this was made: mapped pages count. None where Linux doesn't tell."""

    def __init__(self) -> None:
        self._base: int | None = None
        try:
            self.restart()
            self._base = _status("VmRSS")
        except OSError:
            pass

    def restart(self) -> None:
        """Forgets the peak so far; it is still counted from what was resident when this was made."""
        try:
            _CLEAR.write_text("5", encoding="utf-8")  # the high-water mark starts at the present resident size
        except OSError:
            self._base = None

    def bytes(self) -> int | None:
        return None if self._base is None else _status("VmHWM") - self._base


def peak_resident_bytes() -> int | None:
    """The largest resident size this process had so far. None where Linux doesn't tell."""
    try:
        return _status("VmHWM")
    except OSError:
        return None


def _status(field: str) -> int:
    """A size out of /proc/self/status, in bytes."""
    for line in _STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")
