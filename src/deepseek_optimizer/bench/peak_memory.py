"""Peak resident memory of this process, from Linux's /proc."""

from __future__ import annotations

from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Peak resident memory above that at construction, including mapped pages. None where the system is not Linux."""

    def __init__(self) -> None:
        self._base: int | None = None
        try:
            self.restart()
            self._base = _status("VmRSS")
        except OSError:
            pass

    def restart(self) -> None:
        """Resets the peak; it is still counted above what was resident at construction."""
        try:
            _CLEAR.write_text("5", encoding="utf-8")  # resets the high-water mark to the current resident size
        except OSError:
            self._base = None

    def bytes(self) -> int | None:
        return None if self._base is None else _status("VmHWM") - self._base


def peak_resident_bytes() -> int | None:
    """Peak resident memory of this process so far. None where the system is not Linux."""
    try:
        return _status("VmHWM")
    except OSError:
        return None


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in _STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")
