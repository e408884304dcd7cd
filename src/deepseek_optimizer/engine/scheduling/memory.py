"""The interface of the engine to the cache memory that sequences share. Does not import torch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from ...cache import BlockManager, SequenceBlocks

if TYPE_CHECKING:
    from ...backends.base import Plan, StepBatch, StepOutput
    from ...backends.decoding import DecodeCall, Decoded, DraftedCall, DraftedRounds


class Memory(Protocol):
    """The cache memory that sequences share.

    Attributes:
        state_interval: number of tokens after which recurrent states are stored for the prefix cache; 0: the model has none.
    """

    state_interval: int

    def locked(self) -> AbstractContextManager[BlockManager]:
        """Returns a context manager that locks the memory and yields its block manager."""

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copies blocks, each a pair (source, destination)."""

    def drop_blocks(self, sequence: SequenceBlocks, first_block: int, count: int) -> None:
        """Drops full blocks of every group from the middle of a sequence; later tokens move up to other positions.

        Args:
            sequence: the sequence's blocks.
            first_block: index of the first block to drop.
            count: number of blocks to drop.

        Raises:
            CacheFullError: too few blocks are free; nothing was changed.
        """

    def read_block(self, block: int) -> bytes:
        """Returns the content of a block; see `KvStore.read_block`."""

    def write_block(self, block: int, data: bytes) -> None:
        """Writes what `read_block` returned."""

    def read_state(self, slot: int) -> bytes:
        """Returns the recurrent states in a slot; see `KvStore.read_state`."""

    def write_state(self, slot: int, data: bytes) -> None:
        """Writes what `read_state` returned."""

    def release_unused(self) -> None:
        """Returns the memory of the cache to the system if no block is in use."""

    def run(self, plan: Plan, batch: StepBatch) -> StepOutput:
        """Runs a step of a plan over this memory."""

    def decode(self, plan: Plan, batch: StepBatch, call: DecodeCall) -> Decoded:
        """Runs several decode steps of a plan over this memory."""

    def decode_drafted(
        self, plan: Plan, batch: StepBatch, drafter: Plan, pending: StepBatch, call: DraftedCall
    ) -> DraftedRounds:
        """Runs several rounds with drafts over this memory; see `Plan.decode_drafted`."""
