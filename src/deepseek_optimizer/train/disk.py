"""Checks, before the model is loaded, that the output of a training run fits on the disk and can be written."""

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
    """The disk space of a training run.

    Attributes:
        output: the output directory.
        checkpoint: bytes of one checkpoint.
        checkpoints: number of checkpoints that will exist at the same time, in addition to those that exist now.
        result: bytes of the model or adapter that is saved at the end.
        free: bytes free on the disk now.
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
        """Raises ConfigError if the disk has less free space than that."""
        if self.total > self.free:
            raise ConfigError(
                f"output: {self.output} needs {self}; free some space, choose an output on another disk, or set the argument "
                'save_total_limit=1, save_only_model=True or save_strategy="no"'
            )

    def __str__(self) -> str:
        checkpoints = f"{self.checkpoints} checkpoint(s) of {self.checkpoint / 1e6:,.0f} MB, " if self.checkpoints else ""
        return f"{self.total / 1e6:,.0f} MB: {checkpoints}result {self.result / 1e6:,.0f} MB; {self.free / 1e6:,.0f} MB free"


def plan_disk(
    output: Path, args: Any, memory: MemoryPlan, steps: int, present: int, *, adapter: bool, merge: bool = False
) -> DiskPlan:
    """Estimates the disk space of a training run.

    Args:
        args: `DeepSeekTrainingArguments`.
        memory: the memory plan of the run; weights and optimizer state are saved in the formats they have in memory.
        steps: number of steps of the run.
        present: number of checkpoints that already exist in `output`.
        adapter: an adapter is trained.
        merge: the whole model is saved as well, with the adapter merged into it.
    """
    trained = memory.gradients if adapter else memory.weights  # gradients take as many bytes as the trained weights
    state = 0 if args.save_only_model else memory.masters + memory.moments
    saves = _saves(args, steps)
    # A new checkpoint is written before an old one is removed; the newest and the best are never removed.
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
    """Raises ConfigError if a directory, which need not exist yet, cannot be written to. Leaves no files behind."""
    try:
        with tempfile.TemporaryFile(dir=_existing(output)):
            pass
    except OSError as error:
        raise ConfigError(f"output: {output} cannot be written: {error.strerror or error}; choose another directory") from None


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _saves(args: Any, steps: int) -> int:
    """The maximum number of checkpoints that a run writes."""
    if args.save_strategy == "no":
        return 0
    if args.save_strategy == "epoch":
        return math.ceil(args.num_train_epochs)
    every = args.save_steps if args.save_steps >= 1 else args.save_steps * steps
    return math.ceil(steps / max(1, every))
