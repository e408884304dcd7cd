"""The blocks of one sequence in one group of layers. No torch, no bytes."""

from __future__ import annotations

from .forgetting import BLOCK_TOKENS, Forgetting

HOLE = -1  # stands for a block that was released early


class BlockTable:
    """Block ids in the order of the sequence.

    Args:
        forgetting: which blocks may be released early; None: none.

    Attributes:
        blocks: ids; HOLE stands for a block that was released early.
        holes: indices of the holes, which are contiguous.
    """

    def __init__(self, forgetting: Forgetting | None = None) -> None:
        self.forgetting = forgetting
        self.blocks: list[int] = []
        self.holes = range(0)

    @property
    def held(self) -> int:
        """Number of blocks that are not holes."""
        return len(self.blocks) - len(self.holes)

    def adopt(self, blocks: list[int]) -> None:
        """Sets the blocks of an empty table; some of them may be holes."""
        self.blocks = list(blocks)
        holes = [n for n, block in enumerate(blocks) if block == HOLE]
        self.holes = range(holes[0], holes[-1] + 1) if holes else range(0)

    def forgettable(self, tokens: int) -> range:
        """Indices of the blocks that no token after the first `tokens` attends to and that have not been released."""
        if self.forgetting is None:
            return range(0)
        first = self.holes.stop if self.holes else self.forgetting.sink_blocks
        return range(first, self.forgetting.first_kept(tokens))

    def forget(self, gone: range) -> list[int]:
        """Replaces `forgettable` blocks by holes; returns their ids."""
        released = self.blocks[gone.start : gone.stop]
        if gone:
            self.blocks[gone.start : gone.stop] = [HOLE] * len(gone)
            self.holes = range(self.holes.start if self.holes else gone.start, gone.stop)
        return released

    def holes_within(self, tokens: int) -> range:
        """The holes that remain if only the first `tokens` tokens do."""
        return self.holes if tokens > self.holes.start * BLOCK_TOKENS else range(0)

    def lacks(self, tokens: int, holes: range) -> bool:
        """Whether the token after the first `tokens` attends to one of these holes."""
        return bool(holes) and self.forgetting is not None and self.forgetting.first_seen(tokens) < holes.stop

    def nearest(self, tokens: int) -> int:
        """The largest number of tokens, at most `tokens`, after which the next token attends to no hole."""
        return self.holes.start * BLOCK_TOKENS if self.lacks(tokens, self.holes_within(tokens)) else tokens

    def holes_after_drop(self, first: int, count: int) -> range:
        """The holes after `count` blocks from `first` on are dropped and later ones move up."""
        return range(*(place if place <= first else max(first, place - count) for place in (self.holes.start, self.holes.stop)))

    def fork(self) -> BlockTable:
        """A table with the same blocks."""
        twin = BlockTable(self.forgetting)
        twin.blocks, twin.holes = list(self.blocks), self.holes
        return twin
