"""`sliding_window_mask`: masks of a window with sinks, for attention functions that take a mask tensor.

mask[i, j] is True where query i attends to key j: j <= i and (i - j < window or j < sinks). The first tokens stay visible
because models put much of their attention on them (Xiao et al. 2023, StreamingLLM, section 3). A mask of n tokens takes n * n
bytes; `attention_optimization="sliding"`, and `attn_implementation="dso_sliding"` in plain Transformers, need no mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch

from ...errors import ConfigError, NotEnoughMemoryError
from ...system.memory import RESERVE_SHARE, free_memory

MAX_WINDOW, MAX_SINKS = 1 << 24, 1024  # as in DeepSeekConfig
_GIVEN = "a tokenizer's output, rows of token ids, one row, or the number of tokens of one"


def sliding_window_mask(chunks: Any, window: int, sinks: int = 4) -> WindowMasks:
    """The sliding-window mask of each row, built when it is accessed.

    Args:
        chunks: a tokenizer's output (rows of any lengths, as lists or tensors), a list of rows, one row, or a number of tokens.
            If there is an attention mask, padding attends to nothing and is never attended to, and a row begins after it.
            Only the length of a row matters: `[range(n) for n in lengths]` and {"length": lengths} are enough.
        window: maximum number of tokens that a query attends to, itself included.
        sinks: number of first tokens of a row that all later ones attend to as well.

    Returns:
        bool tensors [n, n], one per row. Consecutive rows of the same shape share a tensor: do not modify it.

    Raises:
        ConfigError: an argument is not valid.
        NotEnoughMemoryError: a mask does not fit in free memory; nothing was allocated.
    """
    rows = _rows(chunks)
    masks = WindowMasks(rows, whole("window", window, 1, MAX_WINDOW), whole("sinks", sinks, 0, MAX_SINKS))
    if rows:
        _check_memory(max(rows, key=lambda row: row.bytes))
    return masks


def whole(name: str, value: Any, low: int, high: int) -> int:
    """`value` as an int; ConfigError if it is not an integer from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise ConfigError(f"{name} must be an integer from {low} to {high}, got {value!r}")
    return int(value)


@dataclass(frozen=True)
class Row:
    """A row of tokens. `real`: bool [tokens], False for padding; None: no padding."""

    tokens: int
    real: torch.Tensor | None = None

    @property
    def bytes(self) -> int:
        """Memory needed to build the mask: one byte per pair of tokens, and with padding those of the real tokens again."""
        return self.tokens**2 + (0 if self.real is None else int(self.real.sum()) ** 2)

    def like(self, other: Row) -> bool:
        """Whether both rows have the same mask."""
        if self.tokens != other.tokens or (self.real is None) != (other.real is None):
            return False
        return self.real is None or other.real is None or torch.equal(self.real, other.real)


class WindowMasks(Sequence[torch.Tensor]):
    """The masks of several rows, each built when it is accessed; only the latest stays in memory."""

    def __init__(self, rows: list[Row], window: int, sinks: int) -> None:
        self.rows, self.window, self.sinks = rows, window, sinks
        self._latest: tuple[Row, torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> WindowMasks: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | WindowMasks:
        if isinstance(index, slice):
            return WindowMasks(self.rows[index], self.window, self.sinks)
        row = self.rows[index]
        if self._latest is None or not row.like(self._latest[0]):
            self._latest = None  # frees its memory for the next
            _check_memory(row)
            self._latest = (row, self._made(row))
        return self._latest[1]

    def _made(self, row: Row) -> torch.Tensor:
        if row.real is None:
            return self._band(row.tokens)
        mask = torch.zeros(row.tokens, row.tokens, dtype=torch.bool, device="cpu")
        places = row.real.nonzero().flatten()
        if not len(places):
            return mask
        first, end = int(places[0]), int(places[-1]) + 1
        mask[first:end, first:end] = self._band(end - first)
        if len(places) < end - first:
            mask &= row.real[:, None]
            mask &= row.real
        return mask

    def _band(self, n: int) -> torch.Tensor:
        """bool [n, n], built in place: a matrix of position differences would take eight times the memory."""
        mask = torch.ones(n, n, dtype=torch.bool, device="cpu").tril_().triu_(1 - self.window)
        mask[:, : self.sinks] = torch.ones(n, min(n, self.sinks), dtype=torch.bool, device="cpu").tril_()
        return mask

    def __repr__(self) -> str:
        return f"WindowMasks({len(self)} rows, window={self.window}, sinks={self.sinks})"


def _check_memory(row: Row) -> None:
    memory = free_memory()
    if row.bytes > memory.free * (1 - RESERVE_SHARE):
        raise NotEnoughMemoryError(
            f"the mask of a row of {row.tokens} tokens", row.bytes, memory.free,
            'use load_model(path, attention_optimization="sliding") or from_pretrained(path, '
            'attn_implementation="dso_sliding"), which need no mask, or shorter rows (truncation=True)',
            memory,
        )  # fmt: skip


def _rows(chunks: Any) -> list[Row]:
    if not isinstance(chunks, Mapping):
        return [Row(len(row)) for row in _split("chunks", chunks)]
    if "input_ids" not in chunks:
        if "length" not in chunks:
            raise ConfigError(
                f"chunks must have input_ids or length, but has {', '.join(map(str, chunks)) or 'no fields'}; pass the "
                "tokenizer's output"
            )
        lengths = chunks["length"]
        lengths = lengths.tolist() if hasattr(lengths, "tolist") else lengths
        return [Row(whole("length", n, 0, 1 << 40)) for n in (lengths if isinstance(lengths, (list, tuple)) else [lengths])]
    rows = _split("input_ids", chunks["input_ids"])
    if chunks.get("attention_mask") is None:
        return [Row(len(row)) for row in rows]
    masks = [torch.as_tensor(row, dtype=torch.bool, device="cpu") for row in _split("attention_mask", chunks["attention_mask"])]
    if [len(row) for row in rows] != [len(row) for row in masks]:
        raise ConfigError("attention_mask must have the shape of input_ids; pass both from the same call of the tokenizer")
    return [Row(len(real), None if real.all() else real) for real in masks]


def _split(name: str, value: Any) -> list[Any]:
    """The rows of a batch, a single row or a number of tokens."""
    if isinstance(value, (int, np.integer)):
        return [range(whole(name, value, 0, 1 << 40))]
    if isinstance(value, (torch.Tensor, np.ndarray)):
        if value.ndim not in (1, 2):
            raise ConfigError(f"{name} must have one or two dimensions, got {value.ndim}")
        return [value] if value.ndim == 1 else list(value)
    if isinstance(value, range):
        return [value]
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{name} must be {_GIVEN}, got {type(value).__name__}")
    if value and all(isinstance(v, (int, np.integer)) for v in value):
        return [value]
    for row in value:
        inner = row[0] if isinstance(row, (list, tuple)) and len(row) else 0
        flat = isinstance(row, (list, tuple, range)) and isinstance(inner, (int, np.integer))
        if not flat and not (isinstance(row, (torch.Tensor, np.ndarray)) and row.ndim == 1):
            raise ConfigError(f"{name} must be {_GIVEN}; got a row of type {type(row).__name__} that is not a row of integers")
    return list(value)
