"""The integers of a step that only decodes, one row of each sequence: most steps, for which the host has the least time.

They are those of `StepIntegers.of`. Whatever is the same in all steps of a bucket with as many sequences is kept, and each step
writes the rest.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..base import BLOCK_TOKENS, StepBatch
from .buckets import Bucket, blocks_bucket, rows_bucket
from .division import TILE_FIELDS
from .step import Integers, StepIntegers

MOST_KEPT = 256  # of a few KB each, but for long contexts
_TOKEN, _END = 3, 4  # of `Tiles.fields`


def decodes(batch: StepBatch) -> bool:
    """Whether a step has one row of each sequence, all in phase DECODE."""
    return len(batch.positions) == len(batch.query_len) and not batch.phase.any() and batch.visible_to is None


@dataclass(frozen=True, kw_only=True)
class DecodingIntegers(StepIntegers):
    """As `StepIntegers`; of a padded step that decodes.

    Attributes:
        kept: int32 [size], the integers of another step of the bucket with as many sequences.
        places: where each array begins in it.
        scratch: the block of padding rows.
        changed: what this step has: ids, positions, tokens, tables of blocks and rows of logits.
    """

    kept: Integers
    places: tuple[int, ...]
    scratch: int
    changed: tuple[Any, ...] = ()

    @property
    def size(self) -> int:
        return len(self.kept)

    def write(self, memory: Integers) -> None:
        ids, positions, token, tables, logit_rows = self.changed
        rows, bucket, places = len(ids), self.bucket, self.places
        memory[:] = self.kept
        fields = memory[places[0] : places[0] + rows * TILE_FIELDS].reshape(rows, TILE_FIELDS)
        fields[:, _TOKEN], fields[:, _END] = token, token + 1
        memory[places[2] : places[2] + rows] = ids
        memory[places[3] : places[3] + rows] = positions
        memory[places[5] : places[5] + rows] = token + 1
        groups, blocks = len(tables), min(tables.shape[-1], bucket.blocks)
        slots = memory[places[6] : places[6] + groups * bucket.rows].reshape(groups, bucket.rows)
        own = tables[:, np.arange(rows), token // BLOCK_TOKENS]
        slots[:, :rows] = own * BLOCK_TOKENS + token % BLOCK_TOKENS
        held = memory[places[7] : places[7] + groups * bucket.rows * bucket.blocks]
        held = held.reshape(groups, bucket.rows, bucket.blocks)
        held[:, :rows, :blocks] = tables[..., :blocks]
        held[:, :rows, blocks:] = self.scratch
        memory[places[8] : places[8] + len(logit_rows)] = logit_rows
        memory[places[8] + len(logit_rows) : places[8] + bucket.logit_rows] = 0


class DecodingSteps:
    """Makes `DecodingIntegers`.

    Args:
        groups, block_q: as of `StepIntegers.of`.
    """

    def __init__(self, groups: int, block_q: int) -> None:
        self._groups, self._block_q = groups, block_q
        self._kept: OrderedDict[tuple[Bucket, int, int], DecodingIntegers] = OrderedDict()

    def of(self, batch: StepBatch, scratch: int) -> DecodingIntegers:
        """The integers of a step that `decodes`, which has been checked."""
        rows, token = len(batch.positions), batch.context_len
        bucket = _bucket(batch)
        key = bucket, rows, scratch
        if key not in self._kept:
            self._kept[key] = self._made(batch, scratch)
            if len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        ids = batch.token_ids if len(batch.token_ids) == rows else np.zeros(rows, np.int32)  # as in `StepIntegers.of`
        return replace(self._kept[key], changed=(ids, batch.positions, token, batch.tables(self._groups), batch.logit_rows))

    def _made(self, batch: StepBatch, scratch: int) -> DecodingIntegers:
        whole = StepIntegers.of(batch, self._groups, self._block_q, None, scratch)
        kept = np.zeros(whole.size, np.int32)
        whole.write(kept)
        return DecodingIntegers(
            whole.arrays, (), whole.bucket, whole.block_q, kept=kept, places=_places(whole), scratch=scratch
        )


def _bucket(batch: StepBatch) -> Bucket:
    """`Bucket.of` a step that decodes."""
    rows = rows_bucket(len(batch.positions))
    blocks = blocks_bucket(-(-(int(batch.context_len.max()) + 1) // BLOCK_TOKENS))
    return Bucket(rows, rows, 0, blocks, rows_bucket(len(batch.logit_rows)), batch.last_hidden or batch.draft_states)


def _places(integers: StepIntegers) -> tuple[int, ...]:
    places: list[int] = []
    begin = 0
    for size in integers.sizes:
        places.append(begin)
        begin += size
    return tuple(places)
