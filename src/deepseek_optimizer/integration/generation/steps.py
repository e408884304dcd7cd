"""Runs a plan on Transformers' batches: converts [batch, columns] with padding into ragged steps without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...backends.base import BLOCK_TOKENS, DECODE, Int32, StepBatch
from ...backends.decoding import DecodeCall, Decoded
from ..bind.runtime import Runtime
from .cache import Bool, PagedState

Int64 = npt.NDArray[np.int64]


@dataclass
class PictureColumns:
    """What the columns of pictures have besides their embeddings.

    Attributes:
        axes: int32 [B, q, 3], positions in time, height and width; None: those of `Columns` on each axis.
        of: int32 [B, q], the picture of its row whose tokens all see each other that a token belongs to, -1: none; None: tokens
            see only those up to themselves. Such a picture is in one step.
        features: for each `add_features` of the graph what it adds, float [n, H]; None: nothing.
        feature_of: int64 [B, q], the row of these that belongs to a token, -1: none.
    """

    axes: Int32 | None = None
    of: Int32 | None = None
    features: Sequence[torch.Tensor] | None = None
    feature_of: Int64 | None = None

    def fields(self, rows: Int64, columns: Int64, tokens: Int64, width: int) -> dict[str, Any]:
        """Fields of the step with these tokens.

        Args:
            rows, columns: int64 [T], the places of the tokens.
            tokens: int64 [T], their indices in their sequences, which follow each other.
            width: H.
        """
        fields: dict[str, Any] = {}
        if self.axes is not None:
            fields["axes"] = np.ascontiguousarray(self.axes[rows, columns])
        if self.of is not None:
            fields["visible_to"] = visible_to(self.of[rows, columns], rows, tokens)
        if self.features is not None and self.feature_of is not None:
            index = torch.from_numpy(self.feature_of[rows, columns])
            seen = index >= 0
            if bool(seen.any()):
                added = torch.zeros(len(self.features), len(rows), width, dtype=torch.float32, device="cpu")
                for i, layer in enumerate(self.features):
                    added[i, seen] = layer[index[seen]].detach().to("cpu", torch.float32)
                fields["features"] = added
        return fields


def visible_to(pictures: Int32, sequences: Int64, tokens: Int64) -> Int32 | None:
    """`StepBatch.visible_to` where all tokens of a picture see each other; None: each token sees those up to itself.

    Args:
        pictures: int32 [T], the picture that each token belongs to, -1: none.
        sequences: int64 [T], the sequence that it belongs to.
        tokens: int64 [T], its index in its sequence.
    """
    if (pictures < 0).all():
        return None
    ends = np.flatnonzero((np.diff(pictures) != 0) | (np.diff(sequences) != 0) | (np.diff(tokens) != 1))
    last = np.append(ends, len(pictures) - 1)
    own = np.arange(len(pictures))
    return (tokens[np.where(pictures < 0, own, last[np.searchsorted(last, own)])] + 1).astype(np.int32)


@dataclass
class Columns:
    """The new tokens of all rows of a batch.

    Attributes:
        ids: int32 [B, q]; None with `embeds`.
        embeds: float [B, q, H], or None.
        positions: int32 [B, q], for RoPE.
        kept: bool [B, q], True for real tokens, False for padding; None: no padding.
        wanted: int64 [n], ascending, the columns whose logits are requested.
        phase: DECODE or PREFILL.
        hidden: whether hidden states of all layers are requested.
        last_hidden: whether those of the last layer alone are requested.
        documents: int64 [B, q], ascending along each row, the document of its row that a token belongs to, if rows pack several
            (see `documents_of`). Each document is a separate sequence. None: each row is one sequence.
        pictures: what columns of pictures have besides; None: nothing.
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
    pictures: PictureColumns | None = None

    def sequences(self) -> list[tuple[int, Int64]]:
        """The row of each sequence and the columns of its real tokens, in order."""
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
    """The document that each token of packed rows belongs to. A document begins where a position is not its predecessor's plus
    one, as in Transformers (`masking_utils.find_packed_sequence_indices`).

    Args:
        positions: int32 [B, q].

    Returns:
        int64 [B, q], ascending from 0 along each row; None if every row is one document.
    """
    breaks = np.diff(positions, axis=1) != 1
    if not breaks.any():
        return None
    return np.concatenate([np.zeros((len(positions), 1), np.int64), breaks.cumsum(1)], axis=1)


@dataclass
class _Chunk:
    """Real tokens of one sequence in a step.

    Attributes:
        sequence, row: indices of the sequence and its row.
        columns: the tokens' columns.
        before: number of the sequence's tokens in earlier steps of this call.
    """

    sequence: int
    row: int
    columns: Int64
    before: int


def run_columns(runtime: Runtime, state: PagedState, new: Columns) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Runs all new tokens in steps of at most `config.prefill_chunk` tokens, and adds them to the cache.

    After an error the cache is as before, or empty if tokens of that state were already dropped.

    Returns:
        logits, float32 [B, n, V] in the order of `wanted`, zero for padding; hidden states, float32 [layers + 1, B, q, H],
        those of the last layer alone [1, B, q, H], or None.
    """
    rows, q = new.positions.shape
    model, plan = runtime.graph, runtime.current_plan
    before = [sequence.tokens for sequence in state.sequences]
    reach = _reach(state, new, model.max_positions)
    logits: torch.Tensor | None = None
    hidden = None
    if new.hidden or new.last_hidden:
        count = model.hidden_states if new.hidden else 1
        hidden = torch.zeros(count, rows, q, model.hidden_size, dtype=torch.float32, device="cpu")
    place = np.full(q, -1, np.int64)  # column -> index in the logits
    place[new.wanted] = np.arange(len(new.wanted))
    state.forget()
    try:
        for chunks in _steps(new, runtime.config.prefill_chunk):
            batch, targets = _batch(state, new, chunks, before, place, reach, model.hidden_size)
            output = state.arena.run(plan, batch)
            if state.follower is not None:
                assert output.draft_states is not None
                ends = np.cumsum(batch.query_len)
                for chunk, end in zip(chunks, ends, strict=True):
                    state.follower(chunk.row, output.draft_states[end - len(chunk.columns) : end])
            if len(targets) == rows * len(new.wanted):  # one step computed everything, in order
                logits = output.logits.view(rows, len(new.wanted), model.vocab_size)
            elif len(targets):
                if logits is None:
                    logits = output.logits.new_zeros(rows, len(new.wanted), model.vocab_size)
                logits.view(-1, model.vocab_size)[torch.from_numpy(targets)] = output.logits
            if hidden is not None:
                flat = np.concatenate([c.row * q + c.columns for c in chunks])
                hidden = hidden.to(output.logits.device)
                states = output.hidden if new.hidden else output.last_hidden
                assert states is not None
                hidden.view(len(hidden), rows * q, -1)[:, torch.from_numpy(flat)] = states
            if not state.verifies:
                state.forget()
    except BaseException:
        state.restore(before)
        raise
    state.add_columns(q, new.kept)
    if logits is None:
        logits = torch.zeros(rows, len(new.wanted), model.vocab_size, dtype=torch.float32, device="cpu")
    return logits, hidden


def _steps(new: Columns, limit: int) -> Iterator[list[_Chunk]]:
    """Splits the batch into steps of at most `limit` tokens, sequence by sequence. Pictures whose tokens see each other are not
    divided, even if they are larger."""
    chunks: list[_Chunk] = []
    room = limit
    of = None if new.pictures is None else new.pictures.of
    for sequence, (row, columns) in enumerate(new.sequences()):
        begin = 0
        while begin < len(columns):
            take = min(room, len(columns) - begin)
            if of is not None and (take := whole_pictures(of[row, columns], begin, take, first=room == limit)) == 0:
                yield chunks
                chunks, room = [], limit
                continue
            chunks.append(_Chunk(sequence, row, columns[begin : begin + take], begin))
            begin, room = begin + take, room - take
            if room <= 0:
                yield chunks
                chunks, room = [], limit
    if chunks:
        yield chunks


def whole_pictures(pictures: Int32, begin: int, take: int, *, first: bool) -> int:
    """How many tokens from `begin` on a step takes, at most `take` unless a picture is larger, without dividing a picture.

    Args:
        pictures: int32 [tokens], the picture of each token, -1: none.
        begin, take: as above, within the tokens.
        first: whether these are the first tokens of the step; otherwise it may take none.
    """
    end = begin + take
    if end == len(pictures) or pictures[end] < 0 or pictures[end - 1] != pictures[end]:
        return take
    same = np.flatnonzero(pictures == pictures[end])
    start, stop = max(begin, int(same[0])), int(same[-1]) + 1
    if start > begin:
        return start - begin
    return stop - begin if first else 0


def _reach(state: PagedState, new: Columns, context: int) -> Int32:
    """The number of tokens that each row's RoPE frequencies are computed for, int32 [B]; fixed at a row's first token if its
    length is known."""
    rows, q = new.positions.shape
    kept = np.ones((rows, q), np.bool_) if new.kept is None else new.kept
    highest = np.where(kept, new.positions, 0).max(1) + 1
    if new.documents is not None:
        return highest  # packed rows have no cache and are not continued
    first, begins = kept.argmax(1), kept.any(1) & np.array([s.tokens == 0 for s in state.sequences])
    if begins.any():
        reach = 0
        if state.length is not None:
            start = new.positions[np.arange(rows), first] - state.columns - first  # position of column 0
            reach = np.clip(start + state.length, 1, context)
        state.reach = np.where(begins, reach, state.reach).astype(np.int32)
    return np.where(state.reach > 0, state.reach, highest).astype(np.int32)


def _batch(
    state: PagedState, new: Columns, chunks: list[_Chunk], before: list[int], place: Int64, reach: Int32, width: int
) -> tuple[StepBatch, Int64]:
    """The batch of one step, with its blocks allocated, and the index in [B * n] of each of its rows of logits."""
    rows, sequences = [c.row for c in chunks], [c.sequence for c in chunks]
    counts = np.array([len(c.columns) for c in chunks], np.int32)
    with state.arena.locked():
        for chunk in chunks:
            state.append(chunk.sequence, len(chunk.columns), state.undoable(len(chunk.columns)))
    row_of = np.repeat(np.array(rows), counts)
    column_of = np.concatenate([c.columns for c in chunks])
    target = place[column_of]
    wanted = np.flatnonzero(target >= 0)
    n = int((place >= 0).sum())
    embeds = None
    if new.embeds is not None:
        embeds = new.embeds[torch.from_numpy(row_of), torch.from_numpy(column_of)].float()
    context = [before[c.sequence] + c.before for c in chunks]
    state_from, state_to = state.states_of_step(sequences, context, counts.tolist())
    more: dict[str, Any] = {}
    if new.pictures is not None:
        tokens = np.concatenate([np.arange(start, start + n) for start, n in zip(context, counts.tolist(), strict=True)])
        more = new.pictures.fields(row_of, column_of, tokens, width)
    batch = StepBatch(
        token_ids=np.zeros(len(row_of), np.int32) if new.ids is None else new.ids[row_of, column_of],
        positions=new.positions[row_of, column_of],
        query_len=counts,
        context_len=np.array(context, np.int32),
        phase=np.full(len(chunks), new.phase, np.int32),
        block_table=state.tables(sequences),
        logit_rows=wanted.astype(np.int32),
        inputs_embeds=embeds,
        hidden=new.hidden,
        last_hidden=new.last_hidden,
        draft_states=state.follower is not None,
        reach=reach[rows],
        state_from=state_from,
        state_to=state_to,
        **more,
    )
    return batch, row_of[wanted] * n + target[wanted]


class DecodeSteps:
    """Decode steps of one token per row, with arrays that are allocated once; used by the generation loop.

    Args:
        runtime: the model's runtime.
        state: the cache.
        positions: int32 [B], position of each row's next token.
        overwrite: whether a step may overwrite the logits of the previous step.
    """

    def __init__(self, runtime: Runtime, state: PagedState, positions: Int32, *, overwrite: bool = False) -> None:
        self.state, self.plan, self.overwrite = state, runtime.current_plan, overwrite
        self.vocab_size = runtime.graph.vocab_size
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
        """The highest position in the next step."""
        return int(np.max(self.batch.positions)) + 1

    def keep(self, alive: list[int]) -> None:
        """Drops rows that have ended; `alive`: indices of the others among the current rows."""
        b = self.batch
        self.rows = [self.rows[i] for i in alive]
        self.batch = StepBatch(
            b.token_ids[alive], b.positions[alive], b.query_len[alive], b.context_len[alive], b.phase[alive],
            self.state.tables(self.rows), np.arange(len(alive), dtype=np.int32),
            reach=None if b.reach is None else b.reach[alive],
        )  # fmt: skip

    def run(self, tokens: list[int]) -> torch.Tensor:
        """Runs a step with one token per row; returns the logits of the next tokens, float32 [rows, V]."""
        b = self._begin(tokens)
        with self._undone_on_errors():
            logits: torch.Tensor = self.state.arena.run(self.plan, b).logits
        self.state.forget()
        if self.overwrite:
            b.logits = logits
        return logits

    @property
    def room(self) -> int:
        """Maximum number of steps of the next `decode`: those in the same block of the cache, which have the same tables."""
        rest = min(-self.state.sequences[row].tokens % BLOCK_TOKENS for row in self.rows)
        return rest or BLOCK_TOKENS

    def decode(self, tokens: list[int], call: DecodeCall) -> Decoded:
        """Runs up to `room` steps, the first of them with one token per row, and has their tokens chosen. For plans on the CPU;
        the logits are overwritten by the next step."""
        b = self._begin(tokens)
        if b.logits is None:
            b.logits = torch.empty(len(tokens), self.vocab_size, dtype=torch.float32, device="cpu")
        if call.steps > 1 and self.state.room(self.rows) < call.steps - 1:
            call = replace(call, steps=1)  # a block is shared, or there are recurrent states
        with self._undone_on_errors():
            decoded = self.state.arena.decode(self.plan, b, call)
        if (more := decoded.steps - 1) > 0:
            for row in self.rows:
                self.state.sequences[row].tokens += more
            b.positions += more
            b.context_len += more
            self._add_columns(more)
        self.state.forget()
        return decoded

    def _begin(self, tokens: list[int]) -> StepBatch:
        """The batch of the next step, with its tokens added to the cache."""
        state, b = self.state, self.batch
        if state.append_one(self.rows):
            b.block_table = state.tables() if len(self.rows) == len(state.sequences) else state.tables(self.rows)
        b.token_ids[:] = tokens
        b.positions += 1
        b.context_len += 1
        b.state_from, b.state_to = state.states_of_step(self.rows, b.context_len.tolist(), [1] * len(self.rows))
        self._add_columns(1)
        return b

    def _add_columns(self, count: int) -> None:
        state = self.state
        kept = None if len(self.rows) == len(state.sequences) else state.only(self.rows).repeat(count, 1)
        state.add_columns(count, kept)

    @contextmanager
    def _undone_on_errors(self) -> Iterator[None]:
        """After an error in a step, the cache is as it was before the step."""
        try:
            yield
        except BaseException:
            self.state.restore_columns(self.state.columns - 1)
            raise
