"""`Plan.decode` as one step: the definition, and all that a backend without a loop of its own needs. No torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .base import KvStore, Plan, StepBatch
from .decoding import DecodeCall, Decoded
from .sampling import GREEDY, NOT_FINITE


def decode_one(plan: Plan, batch: StepBatch, store: KvStore, call: DecodeCall) -> Decoded:
    """Runs one step of a call. See `Plan.decode`."""
    if call.keep_logits and batch.logits is not None:
        batch = replace(batch, logits=batch.logits[: len(call.rows)])
    output = plan.run(batch, store)
    logits, states = output.logits, None if output.draft_states is None else output.draft_states[None]
    nothing = np.zeros((0, len(call.rows)), np.int32)
    kept = logits[None] if call.keep_logits and logits is not None else None
    if any(part is not None for row in call.rows for part in (row.noise, row.variate, row.penalties)) or any(
        row.barred is not None and row.barred_steps > 0 for row in call.rows
    ):
        return Decoded(nothing, logits, states, kept)
    choices = [GREEDY if r.numbers is None else r.filters._replace(u=float(r.numbers[0])) for r in call.rows]
    chosen = plan.choose_tokens(logits, choices)
    if NOT_FINITE in chosen:
        return Decoded(nothing, logits, states, kept)
    tokens = np.array([chosen], np.int32)
    return Decoded(tokens if call.token_of is None else call.token_of[tokens], None, states, kept)
