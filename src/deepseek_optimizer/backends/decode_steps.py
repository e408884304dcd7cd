"""`Plan.decode` in single steps, for a plan that chooses tokens natively but cannot run several steps in one native call. No
torch at import."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from .base import StepBatch
from .decoding import DecodeCall, Decoded, RowChoice


def decode_steps(run_step: Callable[[StepBatch, DecodeCall], Decoded], batch: StepBatch, call: DecodeCall) -> Decoded:
    """Runs the steps of a call. See `Plan.decode`.

    Args:
        run_step: runs a call of one step.
        batch, call: see `Plan.decode`. With penalties, kept logits or draft states, one step is run.
    """
    single = call.keep_logits or batch.draft_states or any(row.penalties is not None for row in call.rows)
    begun, chosen = time.perf_counter(), []
    for step in range(1 if single else call.steps):
        decoded = run_step(batch, replace(call, steps=1, rows=[_from_step(row, step) for row in call.rows]))
        chosen.append(decoded.tokens)
        if decoded.logits is not None:
            break
        took = (time.perf_counter() - begun) / len(chosen)
        if np.isin(decoded.tokens, call.stops).any() or took * (len(chosen) + 1) > call.seconds:
            break
        batch = replace(batch, token_ids=decoded.tokens[0], positions=batch.positions + 1, context_len=batch.context_len + 1)
    return replace(decoded, tokens=np.concatenate(chosen))


def _from_step(row: RowChoice, step: int) -> RowChoice:
    """The choices of a sequence in the steps from `step` on."""
    return row._replace(
        numbers=None if row.numbers is None else row.numbers[step:],
        noise=None if row.noise is None else row.noise[step:],
        barred_steps=max(0, row.barred_steps - step),
    )
