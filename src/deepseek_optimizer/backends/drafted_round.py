"""`Plan.decode_drafted` as one round, step by step: the definition, and all that a backend without a loop of its own needs. No
torch."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from .base import KvStore, Plan, StepBatch
from .decoding import DraftedCall, DraftedRound, DraftedRounds
from .sampling import GREEDY, NOT_FINITE


def drafted_round(
    plan: Plan, batch: StepBatch, drafter: Plan, pending: StepBatch, store: KvStore, call: DraftedCall
) -> DraftedRounds:
    """Runs one round of a call. See `Plan.decode_drafted`."""
    begun = time.perf_counter()
    drafts = _drafts(drafter, pending, store, call)
    output = plan.run(_rows(batch, [int(batch.token_ids[0]), *drafts], int(batch.context_len[0])), store)
    assert output.logits is not None and output.draft_states is not None
    logits, tokens, undecided = output.logits, [], False
    for row, draft in enumerate([*drafts, None]):
        token = _chosen(plan, logits[row : row + 1], call, row)
        if token is None:
            undecided = True
            break
        tokens.append(token)
        if token != draft or token in call.stops:
            break
    done = DraftedRound(tokens, len(drafts), time.perf_counter() - begun)
    return DraftedRounds([done], logits[row] if undecided else None, output.draft_states[: row + 1])


def _drafts(drafter: Plan, pending: StepBatch, store: KvStore, call: DraftedCall) -> list[int]:
    drafts: list[int] = []
    step = pending
    for _ in range(min(call.drafts, call.room - 1)):
        output = drafter.run(step, store)
        assert output.logits is not None and output.draft_states is not None
        (best,) = drafter.choose_tokens(output.logits, [GREEDY])
        if best is None or best == NOT_FINITE:
            break
        drafts.append(best if call.token_of is None else int(call.token_of[best]))
        if float(output.logits[0].softmax(-1)[best]) < call.least:
            break
        step = replace(
            _rows(step, drafts[-1:], int(step.context_len[0]) + len(step.token_ids)), states=output.draft_states[-1:]
        )
    return drafts


def _rows(batch: StepBatch, ids: list[int], context: int) -> StepBatch:
    """The sequence's step over other tokens, after `context` tokens, with the logits of all."""
    shift = int(batch.positions[0]) - int(batch.context_len[0])
    counted = np.arange(len(ids), dtype=np.int32)
    return replace(
        batch, token_ids=np.array(ids, np.int32), positions=counted + np.int32(context + shift),
        query_len=np.array([len(ids)], np.int32), context_len=np.array([context], np.int32), logit_rows=counted, logits=None,
    )  # fmt: skip


def _chosen(plan: Plan, logits: object, call: DraftedCall, step: int) -> int | None:
    """The token of a row of logits; None: the caller must choose it."""
    row = call.row
    if row.penalties is not None or (row.barred is not None and step < row.barred_steps):
        return None
    choice = GREEDY if row.numbers is None else row.filters._replace(u=float(row.numbers[step]))
    (token,) = plan.choose_tokens(logits, [choice])  # type: ignore[arg-type]  # a torch.Tensor
    return None if token == NOT_FINITE else token
