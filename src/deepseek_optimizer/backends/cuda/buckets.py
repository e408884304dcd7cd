"""Sizes that steps are rounded up to. No torch is imported here.

Steps of one bucket run the same kernels on the same addresses and share a captured graph (`captured.py`). Work is divided by
the rounded sizes too, whether a step is padded or not, so that padding changes no bit of the other rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..base import BLOCK_TOKENS, DECODE, StepBatch

MOST_ROWS = 256  # of a captured step; in larger steps, launches take less time than the device needs
_EXACT = 32  # rows from which buckets are equally wide
_FEWEST_BLOCKS = 8


def rows_bucket(count: int) -> int:
    """A power of two up to 32, then a multiple of 32; 0 stays 0. Kernels choose their constants by the next power of two, so
    all counts of a bucket have the same."""
    if count <= _EXACT:
        return 1 << (count - 1).bit_length() if count else 0
    return -(-count // _EXACT) * _EXACT


def blocks_bucket(count: int) -> int:
    """A power of two, at least 8."""
    return max(_FEWEST_BLOCKS, 1 << (count - 1).bit_length())


@dataclass(frozen=True)
class Bucket:
    """The sizes of a step, rounded up.

    Attributes:
        rows: of the step.
        one_row: tiles of one row (`division.Tiles`): those of rows in phase DECODE, and of padding rows.
        tiles: tiles of rows in phase PREFILL.
        blocks: of the longest sequence.
        logit_rows: rows whose logits are computed.
        states: whether the last hidden states are returned.
    """

    rows: int
    one_row: int
    tiles: int
    blocks: int
    logit_rows: int
    states: bool

    @classmethod
    def of(cls, batch: StepBatch, block_q: int) -> Bucket:
        """The bucket of a step.

        Args:
            block_q: rows of a tile in phase PREFILL.
        """
        prompts = batch.query_len[batch.phase != DECODE]
        rows = rows_bucket(len(batch.positions))
        longest = int((batch.context_len + batch.query_len).max())
        return cls(
            rows=rows,
            one_row=rows_bucket(rows - int(prompts.sum())),
            tiles=rows_bucket(int((-(-prompts // block_q)).sum())),
            blocks=blocks_bucket(-(-longest // BLOCK_TOKENS)),
            logit_rows=rows_bucket(len(batch.logit_rows)),
            states=batch.last_hidden or batch.draft_states,
        )


def may_be_captured(batch: StepBatch) -> bool:
    """Whether a step can be replayed: it is small, and needs nothing besides integers."""
    tensors = batch.inputs_embeds, batch.states, batch.axes, batch.features
    return len(batch.positions) <= MOST_ROWS and all(given is None for given in tensors) and not batch.hidden
