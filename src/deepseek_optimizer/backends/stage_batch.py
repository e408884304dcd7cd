"""The batches of a pipeline's parts: what each needs of a step. See `graph.parallel.pipeline`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from .base import StepBatch

if TYPE_CHECKING:
    import torch


def layer_batch(batch: StepBatch, groups: Sequence[int], rows: torch.Tensor | None) -> StepBatch:
    """The batch of some layers, whose result is the last hidden state.

    Args:
        batch: the step's.
        groups: the groups of layers of the whole cache that these are in.
        rows: float32 [T, H], the hidden rows before the first of them; None: they begin with the embedding.
    """
    table = batch.block_table
    if table.ndim == 3:
        table = table[groups[0]] if len(groups) == 1 else np.ascontiguousarray(table[list(groups)])
    return replace(
        batch, logit_rows=np.zeros(0, np.int32), logits=None, hidden=False, last_hidden=True, draft_states=False, states=rows,
        block_table=table, inputs_embeds=batch.inputs_embeds if rows is None else None,
    )  # fmt: skip


def tail_batch(batch: StepBatch, rows: torch.Tensor | None) -> StepBatch:
    """The batch of what follows the last layer and has no cache.

    Args:
        batch: the step's.
        rows: float32 [T, H], the hidden rows after the last layer.
    """
    table = batch.block_table if batch.block_table.ndim == 2 else batch.block_table[0]
    return replace(batch, states=rows, block_table=np.maximum(table, 0), inputs_embeds=None)
