"""One running sequence: its tokens, and which of them are in the cache; and what it has in a step."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ..backends.base import DECODE
from ..cache import SequenceBlocks


@dataclass(eq=False)
class Sequence:
    """Between steps all tokens but the last are in the cache.

    Attributes:
        index: its number among those it runs with; stays the same when others leave.
        tokens: of the prompt and generated, as the cache has them: no padding.
        blocks: of the cache.
        first_position: RoPE position of token 0; the others count on from there.
        reach: for how many tokens its frequencies are made, where RoPE is dynamic: as many as it may get, for its whole life.
            None: in each step for those that it has.
    """

    index: int
    tokens: list[int]
    blocks: SequenceBlocks
    first_position: int = 0
    reach: int | None = None

    @property
    def cached(self) -> int:
        """Tokens in the cache."""
        return self.blocks.tokens


@dataclass(frozen=True)
class Part:
    """One sequence's rows of a step.

    Attributes:
        ids: tokens that go in.
        start: the first one's place in the cache. Room for all is there already.
        first_block: blocks of the sequence before this one are hidden from the step.
        phase: DECODE or PREFILL: the kernel family.
    """

    sequence: Sequence
    ids: list[int]
    start: int
    first_block: int = 0
    phase: int = DECODE


def rows_of(rows: Any, parts: list[Part]) -> list[Any]:
    """What a step made, a row a token [T, ...], cut into the rows of each part."""
    counts = [len(part.ids) for part in parts]
    return [rows[end - count : end] for end, count in zip(accumulate(counts), counts, strict=True)]
