"""The interpreter lock of a process that serves."""

from __future__ import annotations

import sys

_SECONDS = 1e-3  # that a Python thread may keep the engine and the event loop waiting for the interpreter lock


def switch_often() -> None:
    """Lets the threads of this process take turns more often than by default (5 ms)."""
    sys.setswitchinterval(_SECONDS)
