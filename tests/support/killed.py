"""A process that is killed in the middle of its work."""

from __future__ import annotations

import os
import signal
from types import ModuleType


def die_at(n: int, *calls: tuple[ModuleType, str]) -> None:
    """Kills this process at call `n` (from 0) of these functions, (module, name), all counted together.

    For a forked child: the patches are not undone.
    """
    left = [n]

    def counted(function):
        def call(*args, **kwargs):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*args, **kwargs)

        return call

    for module, name in calls:
        setattr(module, name, counted(getattr(module, name)))
