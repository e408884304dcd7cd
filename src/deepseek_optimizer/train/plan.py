"""The plan of a training run, computed before the model is loaded: steps, tokens, memory and disk space."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from .disk import DiskPlan
from .report import MemoryPlan


@dataclass(frozen=True)
class TrainingPlan:
    """What a training run will do, and the resources it needs.

    Attributes:
        model: the model, as named by the user.
        family: its `model_type`.
        weights: number of parameters.
        trained: number of trained parameters.
        adapter: description of the adapter; None: the model's own weights are trained.
        records, sequences, tokens: sizes of the training data.
        trained_tokens: tokens that the loss covers.
        rows: number of rows that the sequences are packed into; without packing each sequence is a row.
        row: tokens per row.
        filled: fraction of the rows that is not padding.
        eval_sequences: number of evaluation sequences.
        steps: number of training steps.
        batch: rows per step.
        memory: see `report.plan_memory`.
        free: bytes of memory free now.
        disk: see `disk.plan_disk`.
        remarks: notes for the user, one sentence each.
    """

    model: str
    family: str
    weights: int
    trained: int
    adapter: str | None
    records: int
    sequences: int
    tokens: int
    trained_tokens: int
    rows: int
    row: int
    filled: float
    eval_sequences: int
    steps: int
    batch: int
    memory: MemoryPlan
    free: int
    disk: DiskPlan
    remarks: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The plan as a dictionary, for JSON; memory and disk also have a `total`."""
        totals = {name: {**asdict(getattr(self, name)), "total": getattr(self, name).total} for name in ("memory", "disk")}
        return {**asdict(self), **totals}

    def __str__(self) -> str:
        packed = (
            f", packed into {self.rows:,} rows of {self.row:,} ({self.filled:.0%} full)" if self.rows != self.sequences else ""
        )
        held = f"; {self.eval_sequences:,} for evaluation" if self.eval_sequences else ""
        lines = [
            f"model    {self.model} ({self.family}), {self.weights:,} weights",
            f"trained  {self.trained:,} weights" + (f": {self.adapter}" if self.adapter else ""),
            f"data     {self.records:,} records, {self.sequences:,} sequences{held}",
            f"tokens   {self.tokens:,}, {self.trained_tokens:,} of them trained{packed}",
            f"steps    {self.steps:,} of {self.batch} row(s)",
            f"memory   {self.memory}; {self.free / 1e6:,.0f} MB free",
            f"disk     {self.disk}",
        ]
        return "\n".join([*lines, *(f"note     {remark}" for remark in self.remarks)])


def steps_of(rows: int, args: Any) -> int:
    """Number of steps that Trainer runs for `rows` rows under the arguments `args`."""
    if args.max_steps > 0:
        return int(args.max_steps)
    batches = math.ceil(rows / (args.train_batch_size * args.world_size))
    if args.dataloader_drop_last:
        batches = rows // (args.train_batch_size * args.world_size)
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))
