"""On which CPUs a thread runs, and the threads that it starts. Linux only; elsewhere nothing is limited."""

from __future__ import annotations

import os
from collections.abc import Collection
from types import TracebackType


class OnCpus:
    """A context in which the calling thread runs on some CPUs only. Threads that it starts there stay on them.

    Args:
        cpus: the system's numbers; None: no others than before. If the thread may use none of them any more, nothing changes.
    """

    def __init__(self, cpus: Collection[int] | None) -> None:
        self._cpus = cpus
        self._before: set[int] | None = None

    def __enter__(self) -> None:
        if self._cpus is None or not hasattr(os, "sched_setaffinity"):
            return
        before = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, self._cpus)
        except OSError:  # the process's own limits have changed
            return
        self._before = before

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._before is not None:
            before, self._before = self._before, None
            os.sched_setaffinity(0, before)
