"""Rows that are evaluated twice: several processes evaluate equally many, so accelerate fills the last batches with rows of the
beginning."""

from __future__ import annotations

import torch.distributed as dist
from accelerate.state import GradientState

from . import group


def own_rows(rows: int) -> int:
    """How many rows of the batch that is being evaluated count: those before the repeated ones. With one process, all.

    Args:
        rows: of the batch, equally many in every process.
    """
    state = GradientState()
    if group.size() == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return rows
    return min(rows, max(0, state.remainder - dist.get_rank() * rows))
