"""Whether a run of training can write what it will: looked at before its model is loaded."""

from __future__ import annotations

import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .report import MemoryPlan


@dataclass(frozen=True)
class DiskPlan:
    """
    Attributes:
        output: where the run writes.
        checkpoint: bytes of one checkpoint. checkpoints: how many more will lie there at once than do now.
        result: bytes of the model or adapter that is saved at the end.
        free: bytes that are free on that disk now.
    """

    output: str
    checkpoint: int
    checkpoints: int
    result: int
    free: int

    @property
    def total(self) -> int:
        return self.checkpoint * self.checkpoints + self.result

    def check(self) -> None:
        """Raises ConfigError if it is more than is free."""
        if self.total > self.free:
            raise ConfigError(
                f"output: {self.output}: {self}. Free some space, name an output on another disk, or set save_total_limit=1, "
                'save_only_model=True or save_strategy="no" among the arguments'
            )

    def __str__(self) -> str:
        held = f"{self.checkpoints} checkpoint(s) of {self.checkpoint / 1e6:,.0f} MB, " if self.checkpoints else ""
        return f"{self.total / 1e6:,.0f} MB: {held}result {self.result / 1e6:,.0f} MB; {self.free / 1e6:,.0f} MB are free"


def plan_disk(
    output: Path, args: Any, memory: MemoryPlan, steps: int, present: int, *, adapter: bool, merge: bool = False
) -> DiskPlan:
    """
    Args:
        args: `DeepSeekTrainingArguments`.
        memory: of the same run: weights and the optimizer's state are saved as they are held.
        steps: of the run.
        present: checkpoints that lie in `output` already.
        adapter, merge: whether an adapter is trained, and whether the whole model is saved with it.
    """
    trained = memory.gradients if adapter else memory.weights  # gradients are as large as what they are of
    state = 0 if args.save_only_model else memory.masters + memory.moments
    saves = _saves(args, steps)
    # A new checkpoint is written before an old one goes; the newest and the best stay whatever the limit.
    limit = args.save_total_limit
    at_once = saves if not limit or limit < 0 else min(saves, max(limit, 2 if args.load_best_model_at_end else 1) + 1)
    return DiskPlan(
        output=str(output),
        checkpoint=trained + state,
        checkpoints=max(min(1, saves), at_once - present),
        result=trained + (memory.weights if adapter and merge else 0),
        free=shutil.disk_usage(_existing(output)).free,
    )


def check_writable(output: Path) -> None:
    """Raises ConfigError if nothing can be written into a directory that may not exist yet. Leaves nothing behind."""
    try:
        with tempfile.TemporaryFile(dir=_existing(output)):
            pass
    except OSError as error:
        raise ConfigError(f"output: {output} cannot be written: {error.strerror or error}; name another directory") from None


def _existing(path: Path) -> Path:
    """The path, or what of it exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _saves(args: Any, steps: int) -> int:
    """How many checkpoints a run writes, at most."""
    if args.save_strategy == "no":
        return 0
    if args.save_strategy == "epoch":
        return math.ceil(args.num_train_epochs)
    every = args.save_steps if args.save_steps >= 1 else args.save_steps * steps
    return math.ceil(steps / max(1, every))
