"""What the engine needs of the cache memory that sequences share. No torch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from ...cache import BlockManager, SequenceBlocks

if TYPE_CHECKING:
    from ...backends.base import Plan, StepBatch, StepOutput


class Memory(Protocol):
    """The cache memory that sequences share, and runs over it."""

    def locked(self) -> AbstractContextManager[BlockManager]: ...

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None: ...

    def drop_blocks(self, sequence: SequenceBlocks, first_block: int, count: int) -> None:
        """Lets go of full blocks from the midst of a sequence; the tokens behind move up, and so do their positions.

        Raises: CacheFullError, with nothing changed.
        """

    def run(self, plan: Plan, batch: StepBatch) -> StepOutput: ...
