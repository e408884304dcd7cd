"""The integers of a step: made on the host, and copied to the device at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..base import BLOCK_TOKENS, DECODE, StepBatch, reach_of
from .buckets import Bucket
from .division import ADAPTER_ROWS, DEFAULT, PAIR_FIELDS, TILE_FIELDS, Division, Tiles, most_pair_tiles

Integers = npt.NDArray[np.signedinteger[Any]]
RUN_FIELDS = 5  # of a run, see `Runs`
_ALIGNED = 32  # integers: Triton compiles another kernel for a pointer that is not aligned to 16 bytes


@dataclass(frozen=True)
class Runs:
    """The rows of each sequence of a step, for ops with recurrent states. Each padding row is a run of its own, so that no
    program passes over several; further runs have no rows.

    Attributes:
        fields: int32 [runs, RUN_FIELDS]: first row, number of rows, slot of the state before them or -1, first of `saves`, and
            their number.
        of_rows: int32 [T], the run of each row.
        saves: int32 [n, 2], rows, ascending, and the slot that the state after each is stored in.
    """

    fields: torch.Tensor
    of_rows: torch.Tensor
    saves: torch.Tensor


@dataclass(frozen=True)
class AdapterRows:
    """The rows of a step that have an adapter, in tiles of one adapter.

    Attributes:
        order: int32 [T], the rows by slot.
        fields: int32 [tiles, PAIR_FIELDS]: slot, first place in `order`, and number of rows, which is 0 in further tiles.
    """

    order: torch.Tensor
    fields: torch.Tensor


@dataclass(frozen=True)
class DeviceStep:
    """What kernels read of a step's batch, int32 on the device.

    Attributes:
        phases: the rows in phase DECODE, in tiles of one row, and those in phase PREFILL; without phases that have no rows.
        ids, positions: [T].
        sequence: [T], of each row.
        ends: [T], one past the last token of its sequence that each row sees.
        slots: [G, T], 32 * block + place in it, of each row in each group of layers.
        tables: [G, S, blocks].
        logit_rows: [R].
        frequencies: float32 [S, rot/2] of each RoPE whose frequencies depend on the sequence, by name.
        axes: [3, T], the position on each axis, of graphs whose RoPE has axes, or with patches in a grid.
        runs: of graphs with recurrent states.
        adapters: of steps with adapters.
    """

    phases: tuple[Tiles, ...]
    ids: torch.Tensor
    positions: torch.Tensor
    sequence: torch.Tensor
    ends: torch.Tensor
    slots: torch.Tensor
    tables: torch.Tensor
    logit_rows: torch.Tensor
    frequencies: Mapping[str, torch.Tensor] = field(default_factory=dict)
    axes: torch.Tensor | None = None
    runs: Runs | None = None
    adapters: AdapterRows | None = None


@dataclass(frozen=True)
class StepIntegers:
    """The same on the host.

    A padded step has the sizes of its bucket, so that every array has the same place in memory whatever the step is. Its rows
    after those of the batch belong to one more sequence, all of them to its first token, which is in a block of the cache that
    no real sequence has. Further tiles have no rows.

    Attributes:
        arrays: tiles of one row, tiles of prompts, and then as in `DeviceStep`; of `Runs` and `AdapterRows` their attributes.
        names: of the frequencies.
        axes, adapted: whether there are positions on axes, and adapters.
    """

    arrays: tuple[npt.NDArray[Any], ...]
    names: tuple[str, ...]
    bucket: Bucket
    block_q: int
    axes: bool = False
    adapted: bool = False

    @classmethod
    def of(
        cls,
        batch: StepBatch,
        groups: int,
        block_q: int,
        dynamic: Mapping[str, Any] | None = None,
        scratch: int | None = None,
        states: bool = False,
        axes: bool = False,
        slots_of_adapters: int = 0,
    ) -> StepIntegers:
        """The integers of a batch.

        Args:
            groups: groups of the cache's layers.
            block_q: rows of a tile in prefill.
            dynamic: by name each `RopeSpec` whose frequencies depend on the sequence.
            scratch: the block of padding rows; None: the step is not padded.
            states, axes: whether there are recurrent states, and positions on axes.
            slots_of_adapters: their number; 0: the step has no adapters.
        """
        bucket, sequences = Bucket.of(batch, block_q), len(batch.query_len)
        sequence = np.repeat(np.arange(sequences), batch.query_len)
        starts = np.cumsum(batch.query_len) - batch.query_len
        token = batch.context_len[sequence] + np.arange(len(sequence)) - starts[sequence]
        ends = token + 1 if batch.visible_to is None else batch.visible_to
        tables = batch.tables(groups)
        slots = np.zeros((groups, len(token)), np.int32)
        if tables.shape[-1]:  # otherwise there is no cache
            slots = tables[:, sequence, token // BLOCK_TOKENS] * BLOCK_TOKENS + token % BLOCK_TOKENS
        decoding = batch.phase == DECODE
        rows = batch.decoding_rows  # the first ones
        one_row = _fields(sequence[:rows], np.arange(rows), 1, token[:rows], ends[:rows])
        many = _tiles(batch, starts, ends, np.flatnonzero(~decoding), block_q)
        ids = batch.token_ids if len(batch.token_ids) == len(token) else np.zeros_like(token)  # ignored with `inputs_embeds`
        arrays = [one_row, many, ids, batch.positions, sequence, ends, slots, tables, batch.logit_rows]
        for spec in (dynamic or {}).values():
            arrays.append(np.stack([spec.inv_freq_at(length) for length in reach_of(batch)]).astype(np.float32).view(np.int32))
        if scratch is not None:
            arrays = _padded(arrays, bucket, sequences, scratch)
        if axes:
            own = np.broadcast_to(batch.positions, (3, len(ids))) if batch.axes is None else batch.axes.T
            arrays.append(own if scratch is None else _filled((3, bucket.rows), 0, own))
        if states:
            arrays += _runs(batch, sequence, starts, None if scratch is None else bucket.rows)
        if slots_of_adapters:
            assert batch.adapter_of is not None  # of the caller's steps
            arrays += _adapters(batch.adapter_of[sequence], slots_of_adapters, None if scratch is None else bucket.rows)
        return cls(tuple(arrays), tuple(dynamic or ()), bucket, block_q, axes, slots_of_adapters > 0)

    @property
    def size(self) -> int:
        """Integers of all arrays, each of which is aligned."""
        return sum(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Integers of each array, with those up to the next one."""
        return tuple(_aligned(array.size) for array in self.arrays)

    def write(self, memory: Integers) -> None:
        """Copies the arrays to int32 [size]."""
        begin = 0
        for array in self.arrays:
            memory[begin : begin + array.size] = array.ravel()
            begin += _aligned(array.size)

    def on(self, memory: torch.Tensor, division: Division = DEFAULT) -> DeviceStep:
        """Views of memory [size] that has been written.

        Args:
            division: of the plan.
        """
        views, begin = [], 0
        for array in self.arrays:
            views.append(memory[begin : begin + array.size].view(array.shape))
            begin += _aligned(array.size)
        one_row, many, ids, positions, sequence, ends, slots, tables, logit_rows, *rest = views
        planned = self.bucket.one_row
        tiles = Tiles(one_row, 1, self.bucket.blocks, planned, division), Tiles(many, self.block_q, 0, division=division)
        named, others = rest[: len(self.names)], rest[len(self.names) :]
        frequencies = {name: view.view(torch.float32) for name, view in zip(self.names, named, strict=True)}
        of_adapters = [others.pop() for _ in range(2 if self.adapted else 0)]
        axes, of_runs = (others[0], others[1:]) if self.axes else (None, others)
        runs = Runs(*of_runs) if of_runs else None
        phases = tuple(each for each in tiles if len(each.fields))
        adapters = AdapterRows(*of_adapters[::-1]) if of_adapters else None
        return DeviceStep(phases, ids, positions, sequence, ends, slots, tables, logit_rows, frequencies, axes, runs, adapters)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _tiles(batch: StepBatch, starts: Integers, ends: Integers, sequences: Integers, block_q: int) -> Integers:
    """`Tiles.fields` of these sequences, in tiles of `block_q` rows."""
    if not len(sequences):
        return np.empty((0, TILE_FIELDS), np.int32)
    counts = -(-batch.query_len[sequences] // block_q)
    sequence = np.repeat(sequences, counts)
    number = np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = number * block_q
    count = np.minimum(block_q, batch.query_len[sequence] - begin)
    row = starts[sequence] + begin
    return _fields(sequence, row, count, batch.context_len[sequence] + begin, ends[row + count - 1])


def _fields(*columns: Integers | int) -> Integers:
    """`Tiles.fields`, column by column; the second one is an array."""
    fields = np.empty((np.size(columns[1]), TILE_FIELDS), np.int32)
    for column, values in enumerate(columns):
        fields[:, column] = values
    return fields


def _padded(arrays: list[Any], bucket: Bucket, sequences: int, scratch: int) -> list[Any]:
    """The arrays with the sizes of their bucket."""
    one_row, many, ids, positions, sequence, ends, slots, tables, logit_rows, *frequencies = arrays
    rows, groups = bucket.rows, len(tables)
    of_more = _fields(sequences, np.arange(len(ids), rows), 1, 0, 1)
    return [
        _filled((bucket.one_row, TILE_FIELDS), 0, np.concatenate((one_row, of_more))),
        _filled((bucket.tiles, TILE_FIELDS), 0, many),
        _filled((rows,), 0, ids),
        _filled((rows,), 0, positions),
        _filled((rows,), sequences, sequence),
        _filled((rows,), 1, ends),
        _filled((groups, rows), scratch * BLOCK_TOKENS, slots),
        _filled((groups, rows, bucket.blocks), scratch, tables[..., : bucket.blocks]),
        _filled((bucket.logit_rows,), 0, logit_rows),
        *(_filled((rows, part.shape[1]), 0, part) for part in frequencies),
    ]


def _runs(batch: StepBatch, sequence: Integers, starts: Integers, padded: int | None) -> list[Integers]:
    """The arrays of `Runs`.

    Args:
        sequence: of each row. starts: the first row of each sequence.
        padded: rows of the padded step; None: it is not padded.
    """
    assert batch.state_from is not None and batch.state_to is not None  # checked by `check_batch`
    saves, sequences = batch.state_to.reshape(-1, 2), len(starts)
    first_save = np.searchsorted(saves[:, 0], starts)
    counts = np.diff(np.append(first_save, len(saves)))
    fields = np.stack((starts, batch.query_len, batch.state_from, first_save, counts), 1)
    if padded is None:
        return [fields.astype(np.int32), sequence.astype(np.int32), saves.astype(np.int32)]
    more = padded - len(sequence)
    alone = np.zeros((more, RUN_FIELDS), np.int32)
    alone[:, 0], alone[:, 1], alone[:, 2] = np.arange(len(sequence), padded), 1, -1
    of_rows = np.concatenate((sequence, np.arange(sequences, sequences + more)))
    runs = np.concatenate((fields, alone))
    return [_filled((padded, RUN_FIELDS), 0, runs), _filled((padded,), 0, of_rows), _filled((padded, 2), 0, saves)]


def _adapters(slots: Integers, count: int, padded: int | None) -> list[Integers]:
    """The arrays of `AdapterRows`.

    Args:
        slots: of each row, -1: none. count: number of slots.
        padded: rows of the padded step; None: it is not padded.
    """
    order = np.argsort(slots, kind="stable")[np.count_nonzero(slots < 0) :]
    used, begins, counts = np.unique(slots[order], return_index=True, return_counts=True)
    tiles = [
        (slot, begin + first, min(ADAPTER_ROWS, rows - first))
        for slot, begin, rows in zip(used, begins, counts, strict=True)
        for first in range(0, rows, ADAPTER_ROWS)
    ]
    fields = np.array(tiles, np.int32).reshape(-1, PAIR_FIELDS)
    if padded is None:
        return [order.astype(np.int32), fields]
    most = most_pair_tiles(padded, count, ADAPTER_ROWS)
    return [_filled((padded,), 0, order), _filled((most, PAIR_FIELDS), 0, fields)]


def _filled(shape: tuple[int, ...], value: int, part: Integers) -> Integers:
    """An array with `part` at its beginning, and `value` elsewhere."""
    whole = np.full(shape, value, np.int32)
    whole[tuple(map(slice, part.shape))] = part
    return whole
