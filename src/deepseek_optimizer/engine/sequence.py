"""A running sequence with its tokens and cache blocks, and its part in a step."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ..backends.base import DECODE
from ..backends.qualities import Quality
from ..cache import SequenceBlocks
from .pictures import PictureRows


@dataclass(eq=False)
class Sequence:
    """A sequence of tokens. Between steps, all but the last are in the cache.

    Attributes:
        index: identifies the sequence among those it runs with; stays the same when others leave.
        tokens: token ids of the prompt and the text, without padding.
        blocks: its blocks of the cache.
        first_position: RoPE position of token 0; those of the others follow.
        reach: with dynamic RoPE, the length in tokens that the frequencies are scaled for: the maximum length of the sequence,
            constant while it exists. None: in each step the current length.
        adapter: slot of its LoRA adapter; -1: none.
        pictures: the prompt's rows of pictures; None: it has no pictures.
        quality: see `backends.qualities`; it stays the same while the sequence has blocks.
    """

    index: int
    tokens: list[int]
    blocks: SequenceBlocks
    first_position: int = 0
    reach: int | None = None
    adapter: int = -1
    pictures: PictureRows | None = None
    quality: Quality = "exact"

    @property
    def cached(self) -> int:
        """Number of tokens in the cache."""
        return self.blocks.tokens


@dataclass(frozen=True)
class Part:
    """One sequence's rows of a step.

    Attributes:
        sequence: the sequence.
        ids: token ids to process.
        start: slot of the first one in the sequence's cache. Room for all must be reserved already.
        first_block: blocks of the sequence before this one are not visible in the step.
        phase: DECODE or PREFILL, the kernel family to use.
        quality: that of the plan to use.
    """

    sequence: Sequence
    ids: list[int]
    start: int
    first_block: int = 0
    phase: int = DECODE
    quality: Quality = "exact"


def rows_of(rows: Any, parts: list[Part]) -> list[Any]:
    """Splits an output of a step, [T, ...] with one row per token, into the rows of each part."""
    counts = [len(part.ids) for part in parts]
    return [rows[end - count : end] for end, count in zip(accumulate(counts), counts, strict=True)]
