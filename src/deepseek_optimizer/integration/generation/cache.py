"""`PagedCache`: the paged KV cache as a Transformers `Cache`.

Transformers counts columns: every row of a batch has the same number, padding included. The paged cache holds real tokens only,
each sequence in its own blocks. `columns` and `kept` translate between the two.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ...backends.base import BLOCK_TOKENS, Int32
from ...cache import HOLE, SequenceBlocks, states_of_step
from ...errors import DroppedTokensError, StateMissingError, UnsupportedRequestError
from ..bind.runtime import runtime_of
from ..memory.arena import Arena, WindowRows

Bool = npt.NDArray[np.bool_]

_FIRST_DRAFTS = 32  # the call that processes the prompt may end with so many drafts


class PagedState:
    """The sequences of one cache.

    Attributes:
        sequences: the blocks of each row of the batch.
        columns: tokens per row as Transformers counts them, padding included.
        kept: bool [rows, columns], True for real tokens, False for padding; None: no padding.
        recording: whether Transformers may roll back: calls with several tokens verify drafts (assisted decoding).
        steps: forward calls since `recording` was set; the first of them is still a prefill.
        length: maximum number of columns of a row, which determines `reach` at its first token; None: unknown.
        reach: int32 [rows], with dynamic RoPE the number of tokens that each row's frequencies are computed for; 0: recomputed
            in each call for the current number of tokens.
        follower: called with the last hidden states of all tokens that a forward call adds: (row, float32 [n, H], in order).
    """

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.sequences: list[SequenceBlocks] = []
        self.columns = 0
        self.kept: Bool | None = None
        self.recording, self.steps = False, 0
        self.length: int | None = None
        self.reach: Int32 = np.zeros(0, np.int32)
        self.follower: Callable[[int, torch.Tensor], None] | None = None
        self._tables = self._new_tables(0)
        weakref.finalize(self, arena.reclaim, self.sequences).atexit = False

    def start(self, rows: int) -> None:
        """Adds `rows` empty sequences."""
        with self.arena.locked() as manager:
            self.sequences += [SequenceBlocks(manager) for _ in range(rows)]
        self._tables = self._new_tables(rows)
        self.reach = np.zeros(rows, np.int32)

    def replace(self, sequences: list[SequenceBlocks], kept: Bool | None) -> None:
        """Replaces the sequences; those that are dropped must have been freed before."""
        self.sequences[:] = sequences  # in place: the finalizer holds this list
        self.kept = kept
        self._tables = self._new_tables(len(sequences))
        for row in range(len(sequences)):
            self._write_table(row)

    def append(self, row: int, count: int, undo: int = 0) -> None:
        """Allocates space for `count` more tokens of one sequence, the last `undo` of which may be cropped afterwards. The
        caller must hold the arena's lock.

        Raises:
            CacheFullError: there are too few free blocks; nothing was changed.
        """
        sequence = self.sequences[row]
        if count == 1 and sequence.fits(1):
            sequence.tokens += 1  # the common case: there is space in an unshared block
            return
        self.arena.copy_blocks(sequence.append(count, undo))
        self._write_table(row)

    def append_one(self, rows: list[int]) -> bool:
        """Allocates space for one more token in each of `rows`.

        Returns: whether block tables changed.

        Raises:
            CacheFullError: there are too few free blocks; nothing was changed.
        """
        sequences = [self.sequences[row] for row in rows]
        if all(s.fits(1) for s in sequences):
            for sequence in sequences:
                sequence.tokens += 1
            return False
        with self.arena.locked():
            done = 0
            try:
                for row in rows:
                    self.append(row, 1)
                    done += 1
            except BaseException:
                for sequence in sequences[:done]:
                    sequence.crop(sequence.tokens - 1)
                raise
        return True

    def room(self, rows: list[int]) -> int:
        """Number of tokens that fit into the last block of each of `rows` without changing its table."""
        return min(self.sequences[row].room for row in rows)

    @property
    def verifies(self) -> bool:
        """Whether the next call verifies drafts, some of which may be removed afterwards."""
        return self.recording and self.steps > 0

    def undoable(self, count: int) -> int:
        """Number of the last of `count` new tokens that may be cropped afterwards."""
        return min(count - 1, count if self.verifies else _FIRST_DRAFTS) if self.recording else 0

    def add_columns(self, count: int, kept: Bool | None) -> None:
        """Adds `count` columns; `kept`: bool [rows, count], which hold a real token; None: all."""
        if self.kept is not None or kept is not None:
            old = np.ones((len(self.sequences), self.columns), np.bool_) if self.kept is None else self.kept
            new = np.ones((len(self.sequences), count), np.bool_) if kept is None else kept
            self.kept = np.concatenate([old, new], axis=1)
        self.columns += count

    def written(self, count: int) -> None:
        """Records that `count` tokens were added to the blocks of the only row."""
        self._write_table(0)
        self.add_columns(count, None)

    def only(self, rows: list[int]) -> Bool:
        """`kept` of one new column in which only these rows have a token, bool [all rows, 1]."""
        column = np.zeros((len(self.sequences), 1), np.bool_)
        column[rows] = True
        return column

    def forget(self) -> None:
        """Frees the blocks that are visible to no later token."""
        if any(sequence.forgettable for sequence in self.sequences):
            with self.arena.locked():
                changed = [row for row, sequence in enumerate(self.sequences) if sequence.forget()]
            for row in changed:
                self._write_table(row)

    def _new_tables(self, rows: int, blocks: int = 4) -> Int32:
        """Tables of each group, int32 [G, rows, blocks]."""
        return np.zeros((len(self.arena.manager.groups), rows, blocks), np.int32)

    def _write_table(self, row: int) -> None:
        _, rows, room = self._tables.shape
        blocks = len(self.sequences[row].blocks)
        if blocks > room:
            wider = self._new_tables(rows, max(blocks, 2 * room))
            wider[:, :, :room] = self._tables
            self._tables = wider
        for own, table in zip(self._tables, self.sequences[row].tables, strict=True):
            own[row, :blocks] = table.blocks

    def tables(self, rows: list[int] | None = None) -> Int32:
        """`StepBatch.block_table` for these rows, or for all; entries after a sequence's last block are undefined."""
        tables = self._tables if rows is None else self._tables.take(rows, axis=1)
        return tables if len(tables) > 1 else tables[0]

    def crop_rows(self, tokens: list[int]) -> None:
        """Removes all but the first `tokens[i]` real tokens of row i.

        Raises:
            DroppedTokensError: tokens that would be needed again were dropped from the cache; nothing was changed.
            StateMissingError: a recurrent state that would be needed again was not stored; nothing was changed.
        """
        with self.arena.locked():
            for sequence, count in zip(self.sequences, tokens, strict=True):
                sequence.check_crop(count)
            for sequence, count in zip(self.sequences, tokens, strict=True):
                sequence.crop(count)

    def restore(self, tokens: list[int]) -> None:
        """Like `crop_rows`, after a failed step; clears the cache if its earlier state cannot be restored."""
        try:
            self.crop_rows(tokens)
        except (DroppedTokensError, StateMissingError):
            self.clear()

    def states_of_step(self, rows: list[int], tokens: list[int], counts: list[int]) -> tuple[Int32 | None, Int32 | None]:
        """`state_from` and `state_to` of a step over these rows, whose first tokens and numbers of tokens are given."""
        states = [self.sequences[row].states for row in rows]
        return states_of_step(zip(states, tokens, counts, strict=True))

    def crop_columns(self, keep: int) -> None:
        """Removes all but the first `keep` columns of every row.

        Raises:
            DroppedTokensError: as in `crop_rows`.
        """
        kept = None if self.kept is None else self.kept[:, :keep]
        self.crop_rows([keep] * len(self.sequences) if kept is None else [int(row.sum()) for row in kept])
        self.columns, self.kept = keep, kept

    def restore_columns(self, keep: int) -> None:
        """Like `crop_columns`, after a failed step; clears the cache if its earlier state cannot be restored."""
        try:
            self.crop_columns(keep)
        except (DroppedTokensError, StateMissingError):
            self.clear()

    def select(self, rows: list[int]) -> None:
        """Replaces row i by a copy of the previous row rows[i]; copies share blocks until one of them writes."""
        with self.arena.locked():
            copies = [self.sequences[row].fork() for row in rows]
            for sequence in self.sequences:
                sequence.free()
        self.replace(copies, None if self.kept is None else self.kept[rows])
        self.reach = self.reach[rows]

    def fork(self) -> PagedState:
        """A copy that shares the blocks until one of the two writes."""
        twin = PagedState(self.arena)
        with self.arena.locked():
            copies = [sequence.fork() for sequence in self.sequences]
        twin.replace(copies, None if self.kept is None else self.kept.copy())
        twin.columns, twin.recording, twin.steps = self.columns, self.recording, self.steps
        twin.length, twin.reach = self.length, self.reach.copy()
        return twin

    def clear(self) -> None:
        """Removes all sequences and frees their blocks."""
        self.arena.reclaim(list(self.sequences))
        self.replace([], None)
        self.columns, self.length, self.reach = 0, None, np.zeros(0, np.int32)


class PagedLayer(CacheLayerMixin):
    """One layer of a `PagedCache`, with the interface of Transformers' cache layers.

    Attributes:
        keys, values: float32 copies of the blocks' contents [rows, kv_heads, columns, head_dim], zero for padding and dropped
            tokens. With latent attention, as in Transformers: latents [rows, 1, columns, rank], and rotated keys
            [rows, 1, columns, rope].
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    is_initialized = True
    supports_early_init = False

    def __init__(self, state: PagedState, index: int) -> None:
        self.state, self.index = state, index

    @property
    def keys(self) -> torch.Tensor:  # type: ignore[override]
        return self._read(0)

    @property
    def values(self) -> torch.Tensor:  # type: ignore[override]
        return self._read(1)

    def _read(self, which: int) -> torch.Tensor:
        state, rows = self.state, []
        for i, sequence in enumerate(state.sequences):
            states = self._of_sequence(sequence)[which]
            row = states.new_zeros(states.shape[0], state.columns, states.shape[2])
            row[:, slice(None) if state.kept is None else torch.from_numpy(state.kept[i])] = states
            rows.append(row)
        return torch.stack(rows) if rows else torch.empty(0, dtype=torch.float32, device="cpu")

    def _of_sequence(self, sequence: SequenceBlocks) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [heads, tokens, width]."""
        first, second = self._opened_rows(self.index, sequence)
        shape = self.state.arena.latent
        if shape is None:
            assert second is not None
            return first, second
        latent, rotated = first[None, :, : shape.rank], first[None, :, shape.rank :]
        return latent, torch.cat((rotated[..., 0::2], rotated[..., 1::2]), -1) if shape.paired else rotated

    def _opened_rows(self, layer: int, sequence: SequenceBlocks) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the store has in a layer of the cache, with zeros for dropped tokens."""
        arena = self.state.arena
        group = arena.group_of(layer)
        table, gone = sequence.table(group), sequence.tables[group].holes
        holes = len(gone) * BLOCK_TOKENS
        first, second = arena.store.read(layer, table[table != HOLE], sequence.tokens - holes)
        if holes:
            start = gone.start * BLOCK_TOKENS
            first, second = _opened(first, start, holes), None if second is None else _opened(second, start, holes)
        return first, second

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Does nothing: blocks are allocated when tokens are added."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedRequestError(
            "only the plan can write to a PagedCache, but this call needs Transformers' own forward; start again without a "
            "cache, or pass a transformers.DynamicCache() from the first call on"
        )

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self.state.columns + int(query_length), 0

    def get_seq_length(self) -> int:
        return self.state.columns

    def get_max_length(self) -> int:
        return -1


class WindowLayer(PagedLayer):
    """A decoder layer with compressed attention.

    Attributes:
        keys, values: as in Transformers, the rows that the next token reads by token [rows, 1, columns, width]: those of the
            last `window` - 1 columns. Compressed entries are not included.
    """

    def _read(self, which: int) -> torch.Tensor:
        return super()._read(which)[:, :, 1 - self._rows.window :]

    def _of_sequence(self, sequence: SequenceBlocks) -> tuple[torch.Tensor, torch.Tensor]:
        rows, _ = self._opened_rows(self._rows.kind, sequence)
        return rows[None], rows[None]

    @property
    def _rows(self) -> WindowRows:
        return self.state.arena.windows[self.index]


class EmptyLayer(PagedLayer):
    """A decoder layer whose attention reads the keys and values of an earlier one; its own are None, as in Transformers."""

    keys = values = None  # type: ignore[assignment]


def _opened(rows: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """`rows` [..., tokens, width] with `count` rows of zeros inserted at token `start`."""
    before, after = rows.tensor_split((start,), -2)
    return torch.cat((before, rows.new_zeros(*rows.shape[:-2], count, rows.shape[-1]), after), -2)


class PagedCache(Cache):
    """A paged KV cache of a model; `generate` creates one for each call, and `model(..., cache=...)` accepts one.

    Its blocks return to the model's arena when it is garbage collected, or at `reset()`. A copy from `copy.deepcopy` shares the
    blocks until one of the two writes.

    Args:
        model: an optimized model.
    """

    def __init__(self, model: Any) -> None:
        self._adopt(PagedState(runtime_of(model).arena))

    def _adopt(self, state: PagedState) -> None:
        self.state = state
        layers: list[PagedLayer] = [WindowLayer(state, i) for i in range(len(state.arena.windows))]
        layers += [PagedLayer(state, i) for i in range(state.arena.layers)]
        layers += [EmptyLayer(state, i) for i in range(len(layers), len(layers) + state.arena.empty_layers)]
        super().__init__(layers=layers)  # type: ignore[arg-type]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.state.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return len(self.state.sequences) or -1

    @property
    def is_initialized(self) -> bool:
        return True

    def crop(self, tokens_to_remove: int) -> None:
        """Removes columns from the end of every row.

        Args:
            tokens_to_remove: minus the number of columns to remove; if positive, the number of columns to keep (Transformers'
                older convention).
        """
        state, n = self.state, int(tokens_to_remove)
        keep = max(state.columns + n, 0) if n <= 0 else min(n, state.columns)
        if keep < state.columns:
            state.crop_columns(keep)

    def reset(self) -> None:
        self.state.clear()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.state.select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self.state.select(rows.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state.select([row for row in range(len(self.state.sequences)) for _ in range(repeats)])

    def activate_past_recording(self) -> None:
        self.state.recording, self.state.steps = True, 0

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedCache:
        twin = object.__new__(PagedCache)
        twin._adopt(self.state.fork())
        return twin

    def __repr__(self) -> str:
        return f"PagedCache({len(self.state.sequences)} sequences, {self.state.columns} tokens)"
