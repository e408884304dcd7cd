"""Driving a plan from Transformers' shapes: [batch, columns] with padding in, ragged steps without padding out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ...backends.base import DECODE, Int32, StepBatch
from ..bind.runtime import Runtime
from .cache import Bool, PagedState

Int64 = npt.NDArray[np.int64]


@dataclass
class Columns:
    """New tokens of every row of a batch.

    Attributes:
        ids: int32 [B, q], or None with `embeds`.
        embeds: float [B, q, H], or None.
        positions: int32 [B, q], for RoPE.
        kept: bool [B, q], the real tokens; None where all are.
        wanted: int64 [n], ascending columns whose logits are asked for.
        phase: DECODE or PREFILL.
        hidden: whether hidden states are asked for.
        last_hidden: whether the last of them is wanted where the others are not.
        documents: int64 [B, q], ascending along each row: which document of its row a token belongs to, where rows pack several
            (`documents_of`). Each document is a sequence of its own. None: each row is one sequence.
    """

    ids: Int32 | None
    embeds: torch.Tensor | None
    positions: Int32
    kept: Bool | None
    wanted: Int64
    phase: int
    hidden: bool = False
    last_hidden: bool = False
    documents: Int64 | None = None

    def sequences(self) -> list[tuple[int, Int64]]:
        """Of each sequence, in order: its row, and the columns of its real tokens."""
        rows, q = self.positions.shape
        every = np.arange(q)
        if self.documents is None:
            return [(row, every if self.kept is None else np.flatnonzero(self.kept[row])) for row in range(rows)]
        return [
            (row, columns)
            for row in range(rows)
            for columns in np.split(every, np.flatnonzero(np.diff(self.documents[row])) + 1)
        ]


def documents_of(positions: Int32) -> Int64 | None:
    """Which document each token of packed rows belongs to. A new one begins where a position is not its predecessor's plus one:
    Transformers' rule (`masking_utils.find_packed_sequence_indices`).

    Args:
        positions: int32 [B, q].

    Returns:
        int64 [B, q], ascending from 0 along each row; None where every row is one document.
    """
    breaks = np.diff(positions, axis=1) != 1
    if not breaks.any():
        return None
    return np.concatenate([np.zeros((len(positions), 1), np.int64), breaks.cumsum(1)], axis=1)


@dataclass
class _Piece:
    """Real tokens of one sequence: its number, its row, their columns, and how many tokens of it came before in this call."""

    sequence: int
    row: int
    columns: Int64
    before: int


def run_columns(runtime: Runtime, state: PagedState, new: Columns) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Runs all new tokens, in steps of at most `config.prefill_chunk`, and adds them to the cache.

    Returns:
        logits float32 [B, n, V] in the order of `wanted`, zero for padding; hidden float32 [layers + 1, B, q, H], of the last
        alone [1, B, q, H], or None.

    An error leaves the cache as it was; or empty, where the call had already made it forget some of that.
    """
    rows, q = new.positions.shape
    model, plan = runtime.graph, runtime.plan
    before = [sequence.tokens for sequence in state.sequences]
    reach = _reach(state, new, model.max_positions)
    logits: torch.Tensor | None = None
    hidden = None
    if new.hidden or new.last_hidden:
        count = model.hidden_states if new.hidden else 1
        hidden = torch.zeros(count, rows, q, model.hidden_size, dtype=torch.float32, device="cpu")
    place = np.full(q, -1, np.int64)  # column -> its place in the logits
    place[new.wanted] = np.arange(len(new.wanted))
    state.forget()
    try:
        for pieces in _chunks(new.sequences(), runtime.config.prefill_chunk):
            batch, targets = _batch(state, new, pieces, before, place, reach)
            made = state.arena.run(plan, batch)
            if state.follower is not None:
                assert made.last_hidden is not None
                ends = np.cumsum(batch.query_len)
                for piece, end in zip(pieces, ends, strict=True):
                    state.follower(piece.row, made.last_hidden[end - len(piece.columns) : end])
            if len(targets) == rows * len(new.wanted):  # one step gave everything, in order
                logits = made.logits.view(rows, len(new.wanted), model.vocab_size)
            elif len(targets):
                if logits is None:
                    logits = made.logits.new_zeros(rows, len(new.wanted), model.vocab_size)
                logits.view(-1, model.vocab_size)[torch.from_numpy(targets)] = made.logits
            if hidden is not None:
                flat = np.concatenate([p.row * q + p.columns for p in pieces])
                hidden = hidden.to(made.logits.device)
                made_hidden = made.hidden if new.hidden else made.last_hidden
                assert made_hidden is not None
                hidden.view(len(hidden), rows * q, -1)[:, torch.from_numpy(flat)] = made_hidden
            if not state.verifies:
                state.forget()
    except BaseException:
        state.restore(before)
        raise
    state.add_columns(q, new.kept)
    if logits is None:
        logits = torch.zeros(rows, len(new.wanted), model.vocab_size, dtype=torch.float32, device="cpu")
    return logits, hidden


def _chunks(sequences: list[tuple[int, Int64]], limit: int) -> Iterator[list[_Piece]]:
    """Cuts the batch into steps of at most `limit` tokens, sequence after sequence."""
    pieces: list[_Piece] = []
    room = limit
    for sequence, (row, columns) in enumerate(sequences):
        begin = 0
        while begin < len(columns):
            take = min(room, len(columns) - begin)
            pieces.append(_Piece(sequence, row, columns[begin : begin + take], begin))
            begin, room = begin + take, room - take
            if room == 0:
                yield pieces
                pieces, room = [], limit
    if pieces:
        yield pieces


def _reach(state: PagedState, new: Columns, context: int) -> Int32:
    """int32 [B]: for how many tokens each row's frequencies are made; for good where a row begins and its length is known."""
    rows, q = new.positions.shape
    kept = np.ones((rows, q), np.bool_) if new.kept is None else new.kept
    highest = np.where(kept, new.positions, 0).max(1) + 1
    if new.documents is not None:
        return highest  # packed rows have no cache: nothing goes on from here
    first, begins = kept.argmax(1), kept.any(1) & np.array([s.tokens == 0 for s in state.sequences])
    if begins.any():
        begun = 0
        if state.length is not None:
            start = new.positions[np.arange(rows), first] - state.columns - first  # position of column 0
            begun = np.clip(start + state.length, 1, context)
        state.reach = np.where(begins, begun, state.reach).astype(np.int32)
    return np.where(state.reach > 0, state.reach, highest).astype(np.int32)


def _batch(
    state: PagedState, new: Columns, pieces: list[_Piece], before: list[int], place: Int64, reach: Int32
) -> tuple[StepBatch, Int64]:
    """One step, and where each of its logit rows goes in [B * n]. Takes the blocks."""
    rows, sequences = [p.row for p in pieces], [p.sequence for p in pieces]
    counts = np.array([len(p.columns) for p in pieces], np.int32)
    with state.arena.locked():
        for piece in pieces:
            state.append(piece.sequence, len(piece.columns))
    row_of = np.repeat(np.array(rows), counts)
    column_of = np.concatenate([p.columns for p in pieces])
    goes_to = place[column_of]
    wanted = np.flatnonzero(goes_to >= 0)
    n = int((place >= 0).sum())
    embeds = None
    if new.embeds is not None:
        embeds = new.embeds[torch.from_numpy(row_of), torch.from_numpy(column_of)].float()
    batch = StepBatch(
        token_ids=np.zeros(len(row_of), np.int32) if new.ids is None else new.ids[row_of, column_of],
        positions=new.positions[row_of, column_of],
        query_len=counts,
        context_len=np.array([before[p.sequence] + p.before for p in pieces], np.int32),
        phase=np.full(len(pieces), new.phase, np.int32),
        block_table=state.tables(sequences),
        logit_rows=wanted.astype(np.int32),
        inputs_embeds=embeds,
        hidden=new.hidden,
        last_hidden=state.follower is not None or new.last_hidden,
        reach=reach[rows],
    )
    return batch, row_of[wanted] * n + goes_to[wanted]


class DecodeSteps:
    """One token a row at a time, with every array made once: what the generation loop drives.

    Args:
        positions: int32 [B], of the next token of each row.
        overwrite: a step may write its logits over those of the step before.
    """

    def __init__(self, runtime: Runtime, state: PagedState, positions: Int32, *, overwrite: bool = False) -> None:
        self.state, self.plan, self.overwrite = state, runtime.plan, overwrite
        self.rows = list(range(len(positions)))
        rows = len(positions)
        self.batch = StepBatch(
            token_ids=np.zeros(rows, np.int32),
            positions=positions.astype(np.int32) - 1,
            query_len=np.ones(rows, np.int32),
            context_len=np.array([s.tokens for s in state.sequences], np.int32) - 1,
            phase=np.full(rows, DECODE, np.int32),
            block_table=state.tables(),
            logit_rows=np.arange(rows, dtype=np.int32),
            reach=state.reach if state.reach.all() else None,
        )

    @property
    def next_position(self) -> int:
        """The highest position the next step uses."""
        return int(np.max(self.batch.positions)) + 1

    def keep(self, alive: list[int]) -> None:
        """Leaves out rows that are finished; `alive` are places among the present rows."""
        b = self.batch
        self.rows = [self.rows[i] for i in alive]
        self.batch = StepBatch(
            b.token_ids[alive], b.positions[alive], b.query_len[alive], b.context_len[alive], b.phase[alive],
            self.state.tables(self.rows), np.arange(len(alive), dtype=np.int32),
            reach=None if b.reach is None else b.reach[alive],
        )  # fmt: skip

    def run(self, tokens: list[int]) -> torch.Tensor:
        """tokens: one a row -> logits float32 [rows, V]."""
        state, b = self.state, self.batch
        if state.append_one(self.rows):
            b.block_table = state.tables() if len(self.rows) == len(state.sequences) else state.tables(self.rows)
        b.token_ids[:] = tokens
        b.positions += 1
        b.context_len += 1
        state.add_columns(1, None if len(self.rows) == len(state.sequences) else state.only(self.rows))
        try:
            logits: torch.Tensor = state.arena.run(self.plan, b).logits
        except BaseException:
            state.crop_columns(state.columns - 1)
            raise
        state.forget()
        if self.overwrite:
            b.logits = logits
        return logits
