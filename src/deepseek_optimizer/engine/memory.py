"""What the engine needs of the cache memory that sequences share. No torch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from ..cache import BlockManager

if TYPE_CHECKING:
    from ..backends.base import Plan, StepBatch, StepOutput


class Memory(Protocol):
    """The cache memory that sequences share, and runs over it."""

    def locked(self) -> AbstractContextManager[BlockManager]: ...

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None: ...

    def run(self, plan: Plan, batch: StepBatch) -> StepOutput: ...
