"""Which steps of the engine run several decode steps in one call of the backend, and how their results are written down.

Only where nobody reads the tokens as they come (`Engine.generate`): a stream should have each token when it is ready. Tokens
after the end of a text, such as those after a stop string, are discarded like rejected drafts. Does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..backends.base import DECODE
from ..backends.decoding import DecodeCall, Decoded
from ..backends.sampling import Floats
from .model_facts import ModelFacts
from .scheduling.scheduler import ScheduledChunk, Scheduler
from .step_rows import quality_of

_SECONDS = 0.02  # maximum duration of a call: other threads may want the backend
_KEPT_BYTES = 16 << 20  # of a call's logits


def decode_call(chunks: Sequence[ScheduledChunk], scheduler: Scheduler, facts: ModelFacts) -> DecodeCall | None:
    """Returns the call for a step; None if it must be a single step.

    Args:
        chunks: the chunks of the step.
        scheduler: has chosen them. If other requests run or wait, the next step must be scheduled after this one.
        facts: of the model.
    """
    if scheduler.waiting or len(chunks) < len(scheduler.running):
        return None
    if len({quality_of(chunk) for chunk in chunks}) > 1:  # steps of different plans
        return None
    steps = min((_room(chunk) for chunk in chunks), default=0)
    if steps < 2:
        return None
    keep = any(chunk.running.sampler.sampling.logprobs is not None for chunk in chunks)
    if keep:  # log probabilities are computed after the call
        steps = max(1, min(steps, _KEPT_BYTES // (4 * facts.vocab_size * len(chunks))))
    rows = []
    stops: set[int] = set()
    for chunk in chunks:
        r = chunk.running
        row = r.sampler.row_choice(r.generated, steps, r.sequence.tokens, r.prompt)
        if row is None:
            return None
        rows.append(row)
        stops.update(r.request.sampling.stop_token_ids)
        if not r.request.sampling.ignore_eos:
            stops |= facts.eos
    return DecodeCall(steps, rows, np.array(sorted(stops), np.int32), _SECONDS, keep_logits=keep)


def _room(chunk: ScheduledChunk) -> int:
    """Number of steps in which a chunk's sequence needs no other block and nothing but its tokens; 0: they are single steps."""
    r, blocks = chunk.running, chunk.running.sequence.blocks
    single = chunk.phase != DECODE or chunk.count != 1 or not chunk.ends or chunk.drafts or r.request.embed
    if single or r.request.scored_tokens or (r.prompt_logprobs is not None and not r.prompt_logprobs.complete):
        return 0
    if blocks.tokens != chunk.start + 1 or not blocks.room:
        return 0
    return min(1 + blocks.room, r.room)


def as_drafts(chunks: Sequence[ScheduledChunk], decoded: Decoded) -> tuple[list[int | None], dict[int, Floats]]:
    """Writes the tokens of a call into its chunks, as drafts that were accepted.

    Returns: the token of each row, None for those that are still to be chosen; and the logits of these rows, or of all if the
        call kept them.
    """
    tokens: list[int | None] = []
    logits: dict[int, Floats] = {}
    undecided: Any = None if decoded.logits is None else decoded.logits.numpy()
    for n, chunk in enumerate(chunks):
        if decoded.kept_logits is not None:
            logits.update(enumerate(decoded.kept_logits[:, n].numpy(), len(tokens)))
        chosen: list[int] = decoded.tokens[:, n].tolist()
        tokens += chosen
        if undecided is None:
            chosen = chosen[:-1]
        else:
            logits[len(tokens)] = undecided[n]
            tokens.append(None)
        chunk.drafts = chosen
    return tokens, logits
