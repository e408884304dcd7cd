"""Runs a plan: ragged steps over sequences whose blocks belong to a BlockManager."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from deepseek_optimizer.backends.base import DECODE, PREFILL, StepBatch, StepOutput
from deepseek_optimizer.cache import BlockManager, Groups, SequenceBlocks


@dataclass
class Part:
    """One sequence's part of a step. rows: which of its tokens need logits, by default all. undo: how many of the last may be
    cropped afterwards, also with recurrent states."""

    blocks: SequenceBlocks
    ids: list[int]
    phase: int = PREFILL
    rows: Sequence[int] | None = None
    positions: list[int] | None = None
    undo: int = 0


def make_batch(parts: Sequence[Part], store: Any, *, hidden: bool = False, inputs_embeds: Any = None, **more: Any) -> StepBatch:
    """Allocates blocks for the parts' tokens (copying shared ones in `store`) and builds the step, decode parts first.
    `more`: further fields of the step."""
    token_ids: list[int] = []
    positions: list[int] = []
    logit_rows: list[int] = []
    context = [part.blocks.tokens for part in parts]
    state_from: list[int] = []
    state_to: list[tuple[int, int]] = []
    for part, before in zip(parts, context, strict=True):
        for source, target in part.blocks.append(len(part.ids), part.undo):
            store.copy_block(source, target)
        if part.blocks.states is not None:
            source, targets = part.blocks.states.step(before, len(part.ids))
            state_from.append(source)
            state_to += [(len(token_ids) + row, slot) for row, slot in targets]
        logit_rows += [len(token_ids) + row for row in (range(len(part.ids)) if part.rows is None else part.rows)]
        token_ids += part.ids
        positions += range(before, before + len(part.ids)) if part.positions is None else part.positions
    width, groups = max(len(part.blocks.blocks) for part in parts), len(parts[0].blocks.tables)
    table = np.full((groups, len(parts), width), -1, dtype=np.int32)
    for group, rows in enumerate(table):
        for row, part in zip(rows, parts, strict=True):
            row[: len(part.blocks.blocks)] = part.blocks.table(group)
    tables = table if groups > 1 else table[0]
    as_int32 = lambda values: np.asarray(values, dtype=np.int32)  # noqa: E731
    if state_to:
        more = {"state_from": as_int32(state_from), "state_to": as_int32(state_to), **more}
    return StepBatch(
        as_int32(token_ids), as_int32(positions), as_int32([len(part.ids) for part in parts]), as_int32(context),
        as_int32([part.phase for part in parts]), tables, as_int32(logit_rows), inputs_embeds, hidden, **more,
    )  # fmt: skip


def run_step(plan: Any, store: Any, parts: Sequence[Part], **options: Any) -> StepOutput:
    return plan.run(make_batch(parts, store, **options), store)


@dataclass
class Runner:
    """A plan with its own cache."""

    plan: Any
    store: Any
    groups: Groups = (None,)
    manager: BlockManager = field(init=False)

    def __post_init__(self) -> None:
        slots = BlockManager(self.store.num_states) if self.store.num_states else None
        self.manager = BlockManager(self.store.num_blocks, self.groups, slots=slots)

    def sequence(self, interval: int = 0) -> SequenceBlocks:
        return SequenceBlocks(self.manager, interval)

    def logits(self, ids: list[int], chunks: Iterable[int] = (), phase: int = PREFILL) -> torch.Tensor:
        """float32 [T, V] of one new sequence, run in chunks of these sizes, then the rest in one; its blocks are freed."""
        blocks, parts, begin = self.sequence(), [], 0
        for size in (*chunks, len(ids)):
            part = ids[begin : begin + size]
            if part:
                parts.append(run_step(self.plan, self.store, [Part(blocks, part, phase)]).logits)
            begin += size
        blocks.free()
        return torch.cat(parts)

    def hidden(self, ids: list[int]) -> torch.Tensor:
        """float32 [n_hidden, T, H] of one new sequence."""
        blocks = self.sequence()
        hidden = run_step(self.plan, self.store, [Part(blocks, ids)], hidden=True).hidden
        blocks.free()
        return hidden

    def decode(self, prompt: list[int], count: int) -> tuple[list[int], torch.Tensor]:
        """Greedy decoding: `count` tokens after the prompt, and the logits that each was chosen from, float32 [count, V]."""
        blocks, rows = self.sequence(), []
        ids, phase, chosen = prompt, PREFILL, []
        for _ in range(count):
            rows.append(run_step(self.plan, self.store, [Part(blocks, ids, phase, rows=[len(ids) - 1])]).logits[0])
            chosen.append(int(rows[-1].argmax()))
            ids, phase = chosen[-1:], DECODE
        blocks.free()
        return chosen, torch.stack(rows)


def runner(backend: Any, graph: Any, weights: Any, *, kv: str = "fp32", blocks: int = 128, **options: Any) -> Runner:
    """Compiles a plan with a cache of `blocks` blocks of 32 tokens. No group of layers releases blocks."""
    states = 32 if graph.states else 0
    store = backend.new_store(graph, kv, blocks, states)
    return Runner(backend.compile(graph, weights, **options), store, (None,) * graph.cache.groups)
