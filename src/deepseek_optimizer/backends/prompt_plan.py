"""Prompts in models whose last layers read the cache of earlier ones: those layers run only for rows whose results are needed.

Keys and values of a token are complete before the first such layer. Its remaining layers matter for its own logits only, and of
a prompt only the last row's are needed. So a step runs in two parts: all rows without results through a plan that ends with the
last write to the cache, then the others, for which the former are in the cache, through the whole plan.

A row's bits are the same as in one step, since they do not depend on how a prompt is divided.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from .base import PREFILL, Int32, KvStore, Plan, StepBatch, StepOutput, reach_of
from .wrapped_plan import WrappedPlan

_FEWEST = 32  # rows, below which a second pass over the weights costs more than it saves


class PromptPlan(WrappedPlan):
    """A `Plan` that runs the rows of prompts whose results nobody needs through `writing`.

    Args:
        plan: of the whole graph, which has no recurrent states.
        writing: of `graph.partial_graph.writing_graph`, with the same weights.
    """

    def __init__(self, plan: Plan, writing: Plan) -> None:
        super().__init__(plan)
        self._writing = writing

    def run(self, batch: StepBatch, store: KvStore | None) -> StepOutput:
        """See `Plan.run`."""
        first = _without_results(batch)
        if int(first.sum()) < _FEWEST:
            return self._plan.run(batch, store)
        batch = replace(batch, reach=np.array(reach_of(batch), np.int32))
        # A group of layers may have no attention in that plan, which then does not know that blocks may be missing. None of
        # its rows reads or writes these, so any number will do.
        filled = replace(batch, block_table=np.maximum(batch.block_table, 0))
        self._writing.run(_part(filled, np.zeros_like(first), first), store)
        return self._plan.run(_part(batch, first, batch.query_len), store)

    def reserve(self, tokens: int, logit_rows: int) -> None:
        """See `Plan.reserve`. The parts of a step have no more rows than it has."""
        self._writing.reserve(tokens, 0)
        self._plan.reserve(tokens, logit_rows)

    def buffer_bytes(self, tokens: int, logit_rows: int) -> int:
        """See `Plan.buffer_bytes`."""
        return self._writing.buffer_bytes(tokens, 0) + self._plan.buffer_bytes(tokens, logit_rows)


def _without_results(batch: StepBatch) -> Int32:
    """How many of each sequence's first rows have no result that is needed, int32 [S]; at least one row is left."""
    # The tokens of a picture see each other in one step.
    if batch.hidden or batch.last_hidden or batch.draft_states or batch.visible_to is not None:
        return np.zeros_like(batch.query_len)
    starts = np.cumsum(batch.query_len) - batch.query_len
    after = np.searchsorted(batch.logit_rows, starts)  # the first needed row from the sequence's start on
    rows = np.append(batch.logit_rows, np.iinfo(np.int32).max)[after]
    free = np.minimum(rows - starts, batch.query_len - 1)
    return np.where(batch.phase == PREFILL, free, 0).astype(np.int32)


def _part(batch: StepBatch, begin: Int32, end: Int32) -> StepBatch:
    """The step of rows [begin, end) of each sequence, without the sequences that have none."""
    kept = end > begin
    starts = np.cumsum(batch.query_len) - batch.query_len
    rows = np.concatenate([np.arange(s + b, s + e) for s, b, e in zip(starts, begin, end, strict=True)])
    of_rows = {name: getattr(batch, name) for name in ("inputs_embeds", "states", "axes")}
    of_sequences = {name: getattr(batch, name) for name in ("reach", "adapter_of")}
    parts: dict[str, Any] = {name: None if value is None else value[rows] for name, value in of_rows.items()}
    parts |= {name: None if value is None else value[kept] for name, value in of_sequences.items()}
    places = np.searchsorted(rows, batch.logit_rows)
    wanted = (places < len(rows)) & (rows[np.minimum(places, len(rows) - 1)] == batch.logit_rows)
    return replace(
        batch,
        token_ids=batch.token_ids[rows],
        positions=batch.positions[rows],
        query_len=(end - begin)[kept],
        context_len=(batch.context_len + begin)[kept],
        phase=batch.phase[kept],
        block_table=np.ascontiguousarray(batch.block_table[..., kept, :]),
        logit_rows=places[wanted].astype(np.int32),
        logits=batch.logits if wanted.any() else None,
        features=None if batch.features is None else batch.features[:, rows],
        **parts,
    )
