"""The state of one run of a reference plan, and what its ops read of the step's batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ...graph.ir import Node, Value
from ..base import StepBatch


@dataclass
class Step:
    """State shared by the ops of one run.

    Attributes:
        groups: for each group of the cache's layers, for each sequence (rows of the step, tokens before them, blocks as int64
            [n]).
        drafts: the input of `draft_out`, if the step asks for draft states and the graph has such a node.
        state_from: for each sequence the slot of its recurrent states.
        state_to: for each sequence the rows after which these are stored, and the slots for them.
    """

    batch: StepBatch
    store: Any
    device: torch.device
    dtype: torch.dtype
    groups: list[list[tuple[slice, int, torch.Tensor]]]
    state_from: list[int]
    state_to: list[list[tuple[int, int]]]
    values: dict[Value, torch.Tensor] = field(default_factory=dict)
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    drafts: torch.Tensor | None = None

    @classmethod
    def of(cls, batch: StepBatch, store: Any, device: torch.device, dtype: torch.dtype, groups: int) -> Step:
        """The state before the first op; `groups`: number of groups of the cache's layers."""
        tables = torch.from_numpy(batch.tables(groups)).to(device, torch.int64)
        return cls(batch, store, device, dtype, [_sequences(batch, own) for own in tables], *_state_slots(batch))

    def ends(self, rows: slice, node: Node) -> torch.Tensor | None:
        """`StepBatch.visible_to` of these rows in a node, int64 [rows]; None if each row sees the tokens up to itself."""
        ends = self.batch.visible_to
        return (
            None
            if ends is None or node.attrs.get("causal", False)
            else torch.from_numpy(ends[rows]).to(self.device, torch.int64)
        )


def _sequences(batch: StepBatch, tables: torch.Tensor) -> list[tuple[slice, int, torch.Tensor]]:
    """The sequences of a step with their blocks in one group; `tables`: int64 [S, max_blocks]."""
    ends = np.cumsum(batch.query_len)
    return [
        (slice(int(end - count), int(end)), int(context), table)
        for end, count, context, table in zip(ends, batch.query_len, batch.context_len, tables, strict=True)
    ]


def _state_slots(batch: StepBatch) -> tuple[list[int], list[list[tuple[int, int]]]]:
    """`Step.state_from` and `Step.state_to`; both empty for a graph without states."""
    if batch.state_from is None or batch.state_to is None:
        return [], []
    sequence = np.searchsorted(np.cumsum(batch.query_len), batch.state_to[:, 0], side="right")
    return batch.state_from.tolist(), [batch.state_to[sequence == s].tolist() for s in range(len(batch.query_len))]
