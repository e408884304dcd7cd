"""What a run of training will do and take, worked out before its model is loaded."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from .disk import DiskPlan
from .report import MemoryPlan


@dataclass(frozen=True)
class TrainingPlan:
    """
    Attributes:
        model: what is trained, as the user named it. family: its `model_type`.
        weights, trained: how many numbers it has, and how many of them are trained.
        adapter: what is trained beside frozen weights; None: the weights themselves.
        records, sequences, tokens, trained_tokens: of the training data; the last are those that the loss is of.
        rows, row: rows that the sequences are packed into, and the tokens of one; without packing a sequence is a row.
        filled: the part of the rows that is no padding.
        eval_sequences: held back to evaluate on.
        steps, batch: steps of training, and rows in each.
        memory: by `report.plan_memory`. free: bytes of it that are free now.
        disk: by `disk.plan_disk`.
        remarks: on the data, as sentences.
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
        """For programs."""
        totals = {name: {**asdict(getattr(self, name)), "total": getattr(self, name).total} for name in ("memory", "disk")}
        return {**asdict(self), **totals}

    def __str__(self) -> str:
        packed = (
            f", packed into {self.rows:,} rows of {self.row:,} ({self.filled:.0%} full)" if self.rows != self.sequences else ""
        )
        held = f"; {self.eval_sequences:,} to evaluate on" if self.eval_sequences else ""
        lines = [
            f"model    {self.model} ({self.family}), {self.weights:,} weights",
            f"trained  {self.trained:,} weights" + (f": {self.adapter}" if self.adapter else ""),
            f"data     {self.records:,} records, {self.sequences:,} sequences{held}",
            f"tokens   {self.tokens:,}, {self.trained_tokens:,} of them trained{packed}",
            f"steps    {self.steps:,} of {self.batch} row(s)",
            f"memory   {self.memory}; {self.free / 1e6:,.0f} MB are free",
            f"disk     {self.disk}",
        ]
        return "\n".join([*lines, *(f"note     {remark}" for remark in self.remarks)])


def steps_of(rows: int, args: Any) -> int:
    """Steps that Trainer makes of so many rows."""
    if args.max_steps > 0:
        return int(args.max_steps)
    batches = math.ceil(rows / (args.train_batch_size * args.world_size))
    if args.dataloader_drop_last:
        batches = rows // (args.train_batch_size * args.world_size)
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))
