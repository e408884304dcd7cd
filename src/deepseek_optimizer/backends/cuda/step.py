"""The integers of a step on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..base import BLOCK_TOKENS, DECODE, StepBatch
from .division import Tiles

Integers = npt.NDArray[np.signedinteger[Any]]


@dataclass(frozen=True)
class DeviceStep:
    """What kernels read of a step's batch, int32 on the device; it arrives in one transfer.

    Attributes:
        phases: the rows in phase DECODE, in tiles of one row, and those in phase PREFILL; without phases that have no rows.
        ids, positions: [T].
        sequence: [T], of each row.
        ends: [T], one past the last token of its sequence that each row sees.
        slots: [G, T], 32 * block + place in it, of each row in each group of layers.
        tables: [G, S, blocks].
        logit_rows: [R].
    """

    phases: tuple[Tiles, ...]
    ids: torch.Tensor
    positions: torch.Tensor
    sequence: torch.Tensor
    ends: torch.Tensor
    slots: torch.Tensor
    tables: torch.Tensor
    logit_rows: torch.Tensor

    @classmethod
    def of(cls, batch: StepBatch, groups: int, block_q: int, device: torch.device) -> DeviceStep:
        """Copies a batch.

        Args:
            groups: groups of the cache's layers.
            block_q: rows of a tile in prefill.
        """
        sequence = np.repeat(np.arange(len(batch.query_len)), batch.query_len)
        starts = np.cumsum(batch.query_len) - batch.query_len
        token = batch.context_len[sequence] + np.arange(len(sequence)) - starts[sequence]
        ends = token + 1 if batch.visible_to is None else batch.visible_to
        tables = batch.tables(groups)
        slots = tables[:, sequence, token // BLOCK_TOKENS] * BLOCK_TOKENS + token % BLOCK_TOKENS
        decoding = batch.phase == DECODE
        one_row = _tiles(batch, starts, ends, np.flatnonzero(decoding), 1)
        many = _tiles(batch, starts, ends, np.flatnonzero(~decoding), block_q)
        ids = batch.token_ids if len(batch.token_ids) == len(token) else np.zeros_like(token)  # ignored with `inputs_embeds`
        arrays = [ids, batch.positions, sequence, ends, slots, tables, batch.logit_rows, one_row, many]
        on_device = _transferred(arrays, device)
        longest = int((-(-(batch.context_len + batch.query_len)[decoding] // BLOCK_TOKENS)).max(initial=0))
        phases = (Tiles(on_device[7], 1, longest), Tiles(on_device[8], block_q, 0))
        return cls(tuple(phase for phase in phases if len(phase.fields)), *on_device[:7])


def _tiles(batch: StepBatch, starts: Integers, ends: Integers, sequences: Integers, block_q: int) -> Integers:
    """`Tiles.fields` of these sequences."""
    counts = -(-batch.query_len[sequences] // block_q)
    sequence = np.repeat(sequences, counts)
    number = np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = number * block_q
    count = np.minimum(block_q, batch.query_len[sequence] - begin)
    row = starts[sequence] + begin
    return np.stack((sequence, row, count, batch.context_len[sequence] + begin, ends[row + count - 1]), 1).astype(np.int32)


def _transferred(arrays: list[Integers], device: torch.device) -> list[torch.Tensor]:
    """The arrays on the device as int32, in one copy."""
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]).astype(np.int32))
    parts = flat.to(device).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
