"""Whether processes resume a run because torchrun has restarted them.

torchrun restarts processes after any failure, also those that refused to start, such as in the folder of another run. So a run
leaves a mark in its folder when it begins, and only a run that has left one is resumed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ..errors import ConfigError
from . import group

_RESTARTS = "TORCHELASTIC_RESTART_COUNT"  # set by torchrun: how often it has restarted the processes of this machine
_MARK = ".torchrun"  # in the output: a run has begun there, and torchrun may restart it


def decide(output: Path, resume: bool, check: Callable[[bool], bool]) -> bool:
    """Whether the processes of a run resume it. Must be called by all of them; the first one decides.

    Args:
        output: the run's folder.
        resume: whether it was asked for, in any process.
        check: of whether to resume, returns whether there is something to resume.

    Raises:
        ConfigError: in all processes, what `check` raises in the first.
    """
    # Of a machine whose own processes have not failed, the count may be 0.
    restarts, asked = group.total(float(os.environ.get(_RESTARTS, "0")), float(resume))
    mark = output / _MARK

    def first() -> tuple[bool, str | None]:
        restarted = restarts > 0 and mark.is_file()
        if restarts == 0 and _RESTARTS in os.environ:
            mark.unlink(missing_ok=True)  # of an earlier run
        try:
            resumes = check(restarted or asked > 0)
        except ConfigError as error:
            return False, str(error)
        if _RESTARTS in os.environ:
            output.mkdir(parents=True, exist_ok=True)
            mark.touch()
        return resumes, None

    resumes, refusal = group.of_first(first)
    if refusal is not None:
        raise ConfigError(refusal)
    return resumes
