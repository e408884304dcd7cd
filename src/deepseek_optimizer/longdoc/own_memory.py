"""Private memory of this process: resident and not mapped from a file, so that mapped weights do not count."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

_STATUS = Path("/proc/self/status")
_FIELDS = ("RssAnon:", "RssShmem:")
_INTERVAL = 0.02  # seconds between samples


def own_bytes() -> int | None:
    """Bytes of resident anonymous and shared pages. None where the system is not Linux."""
    try:
        lines = [line.split() for line in _STATUS.read_text(encoding="utf-8").splitlines() if line.startswith(_FIELDS)]
    except OSError:
        return None
    return sum(int(line[1]) << 10 for line in lines) if lines else None


class PeakSampler:
    """`with PeakSampler() as peak: ...`; then `peak.bytes` is the maximum of `own_bytes` over samples taken inside."""

    def __init__(self) -> None:
        self.bytes = own_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakSampler:
        if self.bytes is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self._sample()

    def _run(self) -> None:
        while not self._ended.wait(_INTERVAL):
            self._sample()

    def _sample(self) -> None:
        now = own_bytes()
        if now is not None:
            self.bytes = max(self.bytes or 0, now)
